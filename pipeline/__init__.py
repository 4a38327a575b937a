"""Capture: a source and a teacher in, a dataset directory out."""
