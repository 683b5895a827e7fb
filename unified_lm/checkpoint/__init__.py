"""Run state, manifest, export and Hub: what a run leaves on the disk."""
