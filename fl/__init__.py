"""Federated fine-tuning: several sites train one LoRA adapter, and their data never leaves them."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
