"""Cost of a driver as captures grow."""
