"""Where every byte of a fine-tuning job goes, whether it fits, and the smallest change that makes it fit."""

__version__ = "0.1.0"
