"""Other tools' answers beside memplan's, on the same published runs."""
