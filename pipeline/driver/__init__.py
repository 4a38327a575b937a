"""The driver of a capture: its lease, its progress, and the status, which any machine can read from the directory."""
