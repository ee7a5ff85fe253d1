"""Tokenplane's core: scheduler, KV bookkeeping, engine and the backend contract; no hardware, no HTTP, no text."""

__version__ = "0.1.0"
