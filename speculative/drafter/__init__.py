"""The drafter's machine: drafts tokens, has them verified, prints the text."""
