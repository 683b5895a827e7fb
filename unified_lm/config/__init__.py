"""Frozen dataclasses of a run, their cross-checks, and composition from Hydra recipes. No torch import here."""
