"""The command line: `main.py` holds the commands, each room is imported only when its command runs."""
