"""vLLM as a teacher: its engine, the tap inside its worker, and its public path beside it."""
