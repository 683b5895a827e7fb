"""The `unified-lm` command."""
