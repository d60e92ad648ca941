"""Code that the three stages share: configuration, data, prompts, models, training, ROUGE. It imports no stage."""
