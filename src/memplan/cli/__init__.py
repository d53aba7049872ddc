"""The command line: flags in, one call per stage, exit code out."""

from memplan.cli.main import main

__all__ = ["main"]
