"""Datasets to and from the Hugging Face Hub and other stores."""
