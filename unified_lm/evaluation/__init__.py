"""Offline evaluation, analyses, reports and comparisons of finished models."""
