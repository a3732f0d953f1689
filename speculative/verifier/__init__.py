"""The verifier's machine: holds the target, and checks draft tokens."""
