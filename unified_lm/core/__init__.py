"""Lowest layer: errors, name tables, distributed helpers, random-state capture, durable files."""
