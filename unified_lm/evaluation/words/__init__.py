"""Word-level probes on frozen states: part of speech, entities, chunks."""
