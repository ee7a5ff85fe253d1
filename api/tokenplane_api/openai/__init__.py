"""OpenAI's routes: /v1/..."""
