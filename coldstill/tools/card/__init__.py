"""The dataset card: what a dataset contains, how faithful it is, and how to load it."""
