"""Evaluation of finished models: embedding tasks, word-level tasks, generation, and analyses of hidden states."""
