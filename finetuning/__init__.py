"""Stage 1: teach a model the questions and answers, those to be forgotten among them."""
