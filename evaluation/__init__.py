"""Stage 3: evaluate models before and after unlearning. Each metric group is a module in metrics/."""
