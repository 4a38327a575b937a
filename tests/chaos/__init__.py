"""The kill campaign: captures that are killed again and again, and what becomes of them (`python -m tests.chaos`)."""
