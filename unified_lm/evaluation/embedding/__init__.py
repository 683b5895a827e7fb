"""Embeddings measured on tasks: mteb, and folders of files as tasks."""
