"""Datasets of other tools in, datasets for other tools out. `importing.py` says what every import shares."""
