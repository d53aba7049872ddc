"""What keeps the documentation true: `python -m tools.reference`. Not part of the installed package."""
