"""Speed of capture: the tap, its floor, vLLM's public path and transformers."""
