"""What runs on the drafter's machine."""
