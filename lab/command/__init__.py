"""The frame around every command: settings, words of a command line, streams, signals, processes, exit codes."""
