"""Word-level probes on frozen hidden states: parts of speech, named entities, chunks."""
