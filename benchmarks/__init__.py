"""Claims of speed, size and fidelity, each a command: it prints a table with the spread and ends with one JSON line.

What several of them need is in `common` (logs, stored results, measures) and `inputs` (texts and models).
"""
