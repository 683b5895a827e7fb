"""Hard negatives, near duplicates and overlaps: what embeddings and text match find in data."""
