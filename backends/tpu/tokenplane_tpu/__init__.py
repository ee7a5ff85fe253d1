"""Tokenplane on Google TPUs."""

__version__ = "0.1.0"
