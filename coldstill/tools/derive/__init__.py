"""New datasets out of datasets, without the teacher. `deriving.py` says what merge, split and subset share."""
