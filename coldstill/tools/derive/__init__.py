"""New datasets made from datasets, without the teacher: merge, split, subset. They share `deriving.py`."""
