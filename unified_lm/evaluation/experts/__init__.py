"""What the experts of a MONET model are for, and what happens without some of them."""
