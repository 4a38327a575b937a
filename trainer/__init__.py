"""Training: a student learns from a logit dataset on one GPU, without the teacher in memory.

`config.py` holds the settings and `train.py` a whole run; `distill_trainer.py` is transformers' Trainer on a dataset.
"""
