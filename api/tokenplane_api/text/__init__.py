"""Between text and token ids: tokenizer, stream decoding, stop strings, chat templates.

Torch-free and transformers-free. Knows no HTTP and no engine.
"""
