"""What people do with a dataset: each file one command."""
