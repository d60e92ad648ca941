"""Stage 1: finetune a model on the questions and answers, including those to be forgotten."""
