"""Bytes, speed and loss of the codec and of other codecs."""
