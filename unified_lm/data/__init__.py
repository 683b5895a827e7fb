"""From files, Hub and built-in sets to samples: sources, formats, streams and the loader."""
