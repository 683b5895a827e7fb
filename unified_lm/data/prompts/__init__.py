"""Prompt templates and their token-level encoding with exact spans."""
