"""Backbones, attention, adapters, pooling, and where their weights come from."""
