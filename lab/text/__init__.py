"""Text around an engine: prompts and chat templates before it, words and stop strings behind it."""
