"""Evaluation of generation: perplexity and lm-eval."""
