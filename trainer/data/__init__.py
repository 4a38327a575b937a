"""From sealed datasets to batches of tensors, in a shuffled order that resumes exactly."""
