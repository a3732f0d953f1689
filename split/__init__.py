"""One model cut over several machines: inference and training across the cut."""
