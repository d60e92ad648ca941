"""Stage 2: unlearn some of the data that the model was finetuned on. One file per method."""
