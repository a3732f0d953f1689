"""Federated fine-tuning: several sites train one LoRA adapter, and their data never leaves them."""
