"""The frame around every command: settings, overrides, streams, signals, processes, exit codes."""
