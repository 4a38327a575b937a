"""What a capture will cost, before it costs anything."""
