"""Speculative decoding between two machines: draft tokens travel, the text is the target's own."""
