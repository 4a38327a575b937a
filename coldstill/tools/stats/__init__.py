"""Statistics of a dataset: measure them, print them, plot them."""
