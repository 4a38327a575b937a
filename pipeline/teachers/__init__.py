"""Who speaks: one protocol, and an engine per file behind it."""
