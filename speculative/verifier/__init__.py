"""What runs on the verifier's machine."""
