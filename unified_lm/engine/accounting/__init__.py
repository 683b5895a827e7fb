"""What a run costs: memory before it starts, arithmetic and speed while it runs."""
