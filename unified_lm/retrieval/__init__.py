"""Answers from documents: what a model needs of them, kept on disk."""
