"""Measures a student on a logit dataset, against the cached or a loaded teacher."""
