"""Generation measured: perplexity and lm-eval."""
