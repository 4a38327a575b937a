"""What a dataset and a row of it look like: on the terminal, and as a page."""
