"""Checkpoints of runs in progress: what they contain, how they are written, and which one to resume."""
