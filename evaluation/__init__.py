"""Stage 3: evaluate what a model still knows. One file per metric group."""
