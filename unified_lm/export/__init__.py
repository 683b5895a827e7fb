"""The folder that stock tools load: merged weights, manifest, prompts, verified before it appears."""
