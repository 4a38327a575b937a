"""The kill campaigns: captures killed at random moments, and checks of the result (`python -m tests.chaos`)."""
