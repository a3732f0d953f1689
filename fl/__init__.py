"""Federated fine-tuning: one LoRA adapter trained by many, over data that never moves."""
