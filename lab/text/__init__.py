"""Text around an engine: prompts and chat templates before it, penalties, biases and stop strings after it."""
