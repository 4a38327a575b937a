"""Trains a student from a logit dataset, without the teacher in memory.

`config.py` holds the settings, `train.py` a whole run, `distill_trainer.py` the subclass of transformers' Trainer.
"""
