"""Output for people: reports, comparisons of runs, training curves."""
