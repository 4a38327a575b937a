"""One unit: its rows scored and committed, and what is done when its workers die."""
