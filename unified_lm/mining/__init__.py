"""Mining of hard negatives, near-duplicates and overlaps, by embeddings and by text matching."""
