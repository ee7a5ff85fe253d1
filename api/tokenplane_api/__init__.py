"""The HTTP API: OpenAI's and TGI's routes over one engine. Knows the core, no backend and no torch."""

from __future__ import annotations

__version__ = "0.1.0"
