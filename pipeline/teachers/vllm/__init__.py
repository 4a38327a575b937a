"""vLLM as a teacher: engine, tap, self-check and public path."""
