"""The one training loop: steps with GradCache, backends, optimizer, metrics, validation, checkpoints."""
