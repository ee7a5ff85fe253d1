"""Tokenplane on Intel Gaudi."""

__version__ = "0.1.0"
