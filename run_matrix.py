"""Measure what this hardware gives: `python run_matrix.py matrix=decode model=random`."""

from matrix.__main__ import main

if __name__ == "__main__":
    main()
