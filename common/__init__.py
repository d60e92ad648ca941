"""What the three stages share: configuration, data, prompts, models, sampling, ROUGE. Imports none of the stages."""
