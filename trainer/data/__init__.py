"""Reads sealed datasets as batches of tensors, in a shuffled order that resumes exactly."""
