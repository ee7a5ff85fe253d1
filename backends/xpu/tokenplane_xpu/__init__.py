"""Tokenplane on Intel GPUs."""

__version__ = "0.1.0"
