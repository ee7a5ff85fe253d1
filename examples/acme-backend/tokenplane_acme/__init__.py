"""Tokenplane on Acme cards."""

__version__ = "0.2.0"
