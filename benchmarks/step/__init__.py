"""Time and memory of a whole training step."""
