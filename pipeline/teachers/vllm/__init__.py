"""vLLM as a teacher: its engine, the tap inside its workers, the self-check, and the public path."""
