"""Tokenplane on the host CPU."""

__version__ = "0.1.0"
