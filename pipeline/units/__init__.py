"""A store that retries."""
