"""Show a dataset or one of its rows, on the terminal or as an HTML page."""
