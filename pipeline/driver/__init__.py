"""The driver of a capture: its lease, its progress and its status."""
