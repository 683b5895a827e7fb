"""unified_lm: one engine fine-tunes any decoder-only language model to embed and to generate."""

__version__ = "0.1.0"
