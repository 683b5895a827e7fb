"""Templates and their encoding at token level, with exact spans."""
