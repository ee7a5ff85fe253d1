"""Tokenplane on Acme cards."""

__version__ = "0.1.0"
