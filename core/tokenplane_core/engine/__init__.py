"""From requests to steps: scheduling, KV bookkeeping, batching."""
