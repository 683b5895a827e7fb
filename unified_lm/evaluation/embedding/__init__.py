"""Evaluation of embeddings on tasks: mteb's, and folders of files."""
