"""Stage 3: measure what a model still knows. One file a family of metrics."""
