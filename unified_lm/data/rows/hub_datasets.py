"""Rows of Hub data sets, read through `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.data.rows.readers import Rows


def hub_rows(config: SourceConfig) -> tuple[str, str, Any]:
    """Find a Hub data set (or a local folder in the Hub's layout).

    A streamed data set is read once and cached under its request (name, subset, split, revision, limit), so that a resumed
    run sees the same rows; pin `revision` to fix their content.

    Args:
        config: `hub` names it; `subset`, `split`, `revision`, `streaming` and `limit` select the rows.

    Returns:
        Its name with subset and split, a string that changes with its content, and a function that starts reading.

    Raises:
        DataError: not found, not reachable, or no such subset or split.
    """
    name = _name(config)
    if config.streaming:
        request: list[Any] = [config.hub, config.subset, config.split_or_train, config.revision, config.limit]
        request += [config.data_dir] if config.data_dir else []  # younger than the first caches
        return name, f"stream:{json.dumps(request)}", lambda: _stream(config, name)
    dataset = _load(config, name)
    return name, f"hub:{dataset._fingerprint}", lambda: _numbered(dataset, name)


def hub_parts(config: SourceConfig) -> tuple[str, list[str], list[Callable[[int], Rows]]]:
    """The files of a Hub data set, none of which is read as a whole.

    Args:
        config: as in `hub_rows`, with `streaming`.

    Returns:
        Its name with subset and split; its files, with the commit they are of (local ones with their size); and for each
        part of it a function that starts reading at a row, from 0.

    Raises:
        DataError: as in `hub_rows`.
    """
    name = _name(config)
    dataset = _load(config, name)
    count = dataset.num_shards

    def reading(index: int) -> Callable[[int], Rows]:
        origin = f"{name}, file {index + 1} of {count}"
        return lambda start: _numbered(dataset.shard(count, index).skip(start), origin, start)

    return name, _data_files(config, name), [reading(index) for index in range(count)]


def _data_files(config: SourceConfig, name: str) -> list[str]:
    """Addresses of the files of a split: on the Hub they name the commit, of local files the size follows."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(config.hub, config.subset, **_folder(config), revision=config.revision)
        found = (builder.config.data_files or {}).get(config.split_or_train, [])
    except Exception as error:  # as in `_load`
        raise _unreadable(name, error) from error
    return [f"{file} {os.path.getsize(file)}" if os.path.exists(file) else str(file) for file in map(str, found)]


def hub_label_names(config: SourceConfig) -> dict[str, list[str]]:
    """Names of the class labels in a Hub data set's columns of labels, or of lists of labels.

    Args:
        config: as in `hub_rows`.

    Returns:
        Column -> names, in the order of the label numbers; columns of other types are omitted.

    Raises:
        DataError: as in `hub_rows`.
    """
    name = _name(config)
    features = _load(config, name).features or {}
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {column: list(feature.names) for column, feature in inner.items() if hasattr(feature, "names")}


def _name(config: SourceConfig) -> str:
    return "/".join(filter(None, (config.hub, config.subset, config.data_dir, config.split_or_train)))


def _folder(config: SourceConfig) -> dict[str, str]:
    return {"data_dir": config.data_dir} if config.data_dir else {}


def _load(config: SourceConfig, name: str) -> Any:
    import datasets  # imports in half a second, and only this kind of source needs it

    try:
        return datasets.load_dataset(
            config.hub,
            config.subset,
            **_folder(config),
            split=config.split_or_train,
            revision=config.revision,
            streaming=config.streaming,
        )
    except Exception as error:  # every layer below (datasets, hub client, HTTP, parsers) has exceptions of its own
        raise _unreadable(name, error) from error


def _stream(config: SourceConfig, name: str) -> Rows:
    return _numbered(islice(_load(config, name), config.limit), name)


def _numbered(rows: Any, name: str, number: int = 0) -> Rows:
    iterator: Iterator[Any] = iter(rows)
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above: a connection lost, a damaged file
            raise _unreadable(f"{name}, row {number}", error) from error
        yield f"row {number}", row


def _unreadable(name: str, error: Exception) -> DataError:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        fix = "HF_HUB_OFFLINE is set, so only data sets already in the local cache can be read: unset it, or use path=FILE."
    else:
        fix = "Check hub, subset, split and revision, the connection, and `hf auth login` for a private data set."
    return DataError(f"cannot read the Hub data set {name}: {type(error).__name__}: {str(error).strip()} {fix}")
