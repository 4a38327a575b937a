"""Measures a student on a logit dataset, against the cached teacher and optionally against a loaded one."""
