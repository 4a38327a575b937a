"""The student's half: a sealed dataset directory comes in, a trained student goes out; no teacher in memory.

This file imports nothing, so that the command line can read `trainer.config` without loading torch.
"""
