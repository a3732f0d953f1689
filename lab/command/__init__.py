"""What every command does around its work: settings, words of a command line, streams, signals, processes, its end."""
