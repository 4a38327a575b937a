"""The student model: loading, adapters, checks against the dataset, and the forward pass with the loss."""
