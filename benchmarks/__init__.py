"""How fast PMC runs, beside a baseline: the same algorithm with Hugging Face's own tools."""
