"""The tools for a finished dataset: look at it, share it, make datasets from it, exchange it with other projects."""
