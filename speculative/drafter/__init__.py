"""The drafter's machine: drafts tokens, sends them to the verifier, prints the text."""
