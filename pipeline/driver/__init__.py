"""The driver of a capture: its lease, its progress, and the status that others read from the directory alone."""
