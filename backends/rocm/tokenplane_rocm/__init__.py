"""Tokenplane on AMD GPUs."""

__version__ = "0.1.0"
