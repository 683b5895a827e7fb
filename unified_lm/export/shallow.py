"""A view of an export with its first layers only, which fits where the whole model does not."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig

from unified_lm.core.files import write_json

NUM_LAYERS = 2
"""Layers of a view: the second reads states that the first has mixed, so a wrong mask shows in the embeddings of tokens."""


@contextmanager
def shallow_view(folder: Path) -> Iterator[Path]:
    """A temporary folder of links to an export, whose config.json has only the first `NUM_LAYERS` layers.

    Loaders read the weights of those layers, the embeddings and the head, and skip the rest of the files.

    Args:
        folder: the export.

    Yields:
        The view; the export itself where it is no deeper.
    """
    text_config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    key = text_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    depth = int(text_config.num_hidden_layers)
    num_layers = max(NUM_LAYERS, getattr(text_config, "moe_groups", 1))  # MONET's layers share a router in groups
    if depth <= num_layers:
        yield folder
        return
    for name, value in section.items():
        if isinstance(value, list) and len(value) == depth:  # a value per layer, such as its type of attention
            section[name] = value[:num_layers]
    section[key] = num_layers
    with tempfile.TemporaryDirectory() as temporary:
        view = Path(temporary)
        for path in folder.iterdir():
            if path.name != "config.json":
                (view / path.name).symlink_to(path.resolve())
        write_json(view / "config.json", config)
        yield view
