"""Stage 2: make the finetuned model forget some of them. One file a method."""
