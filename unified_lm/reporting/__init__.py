"""What people look at: reports, comparisons of runs, curves."""
