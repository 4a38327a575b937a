"""Runs work units on Ray actors. The only folder that imports Ray."""
