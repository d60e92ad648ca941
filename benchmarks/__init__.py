"""Speed of PMC, compared with a baseline: the same algorithm with Hugging Face's own tools."""
