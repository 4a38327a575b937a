"""Capture: reads a source, runs a teacher on it, and writes a dataset directory."""
