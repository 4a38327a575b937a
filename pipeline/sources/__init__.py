"""From files to token sequences: rows are read by unit, and one call of the chat template gives ids and loss mask."""
