"""The mutation campaign: datasets as a stranger could send them, read under limits (`python -m tests.fuzz`)."""
