"""From a recipe with its groups and `key=value` arguments to a checked configuration. No torch import here."""
