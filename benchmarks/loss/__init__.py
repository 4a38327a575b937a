"""Time and memory of a loss and its gradient."""
