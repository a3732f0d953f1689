"""Speculative decoding between two machines: guesses travel, the text is the target's own."""
