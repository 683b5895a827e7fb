"""Ablations: grids of runs of one recipe, one after another."""
