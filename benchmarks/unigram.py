"""Cross-entropy of held-out texts under the frequencies of training tokens: what a model that knows nothing else reaches.

Every token counts but a start token; frequencies have one added to each token of the vocabulary.

Usage: python benchmarks/unigram.py recipe=monet_tiny [key=value ...]    (the streams and held-out rows of a recipe)
"""

from __future__ import annotations

import sys

import numpy as np

from unified_lm.batch.sample import IGNORE
from unified_lm.composition.compose import compose_run
from unified_lm.data.streams import TableStream, build_streams, build_validation_streams
from unified_lm.models.loading import load_tokenizer


def tokens(stream: TableStream) -> np.ndarray:
    """The learned tokens of an epoch of a stream, int64."""
    found = [sample.labels for sample in stream.draw(stream.num_rows) if sample.labels is not None]
    labels = np.concatenate(found)
    return labels[labels != IGNORE]


def main() -> None:
    """Print one line for each stream that has held-out rows."""
    config = compose_run(sys.argv[1:])
    tokenizer = load_tokenizer(config.model)
    training, held_out = build_streams(config, tokenizer), build_validation_streams(config, tokenizer)
    for name, stream in held_out.items():
        source = training[name]
        assert isinstance(source, TableStream), "rows that are read along are not counted"
        learned = tokens(source)
        counts = np.bincount(learned, minlength=int(config.model.architecture["vocab_size"])) + 1
        seen = tokens(stream)
        nats = -np.log(counts / counts.sum())[seen].mean()
        print(f"{name}: {nats:.3f} nats a token over {len(seen):,} held-out tokens, {len(learned):,} training tokens")


if __name__ == "__main__":
    main()
