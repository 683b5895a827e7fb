"""Conversion of published data sets to files that the recipes read, with the papers' filters and a manifest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.core.outputs import check_files
from unified_lm.data.rows.files import RowWriter, file_hash, output_names, record_row, write_report
from unified_lm.data.rows.hub_datasets import hub_rows
from unified_lm.data.rows.parse import RowParser
from unified_lm.data.rows.published import Dropped, Part, Published, published
from unified_lm.data.rows.readers import Rows, data_files, read_rows
from unified_lm.data.rows.violations import EmptyTextError, RowError, describe

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Prepared:
    """The output of `prepare`.

    Attributes:
        files: the data files.
        manifest: the YAML file in the same folder.
        num_rows: number of rows written.
        dropped: number of rows left out, by reason.
        use: overrides that train on the result.
    """

    files: tuple[Path, ...]
    manifest: Path
    num_rows: int
    dropped: Counter[str]
    use: str


@dataclass(frozen=True)
class _Input:
    """The rows of one output file."""

    origin: str
    stem: str
    output: str
    rows: Callable[[], Rows]


def prepare(
    name: str,
    out_dir: Path,
    *,
    local: Path | None = None,
    revision: str | None = None,
    suffix: str = ".jsonl",
    limit: int | None = None,
) -> Prepared:
    """Write a published data set in the formats of this package.

    Args:
        name: a key of `PUBLISHED`.
        out_dir: folder for the files and `NAME.manifest.yaml`; files of an earlier call are replaced on completion.
        local: folder (or file) with a local copy in the schema of the published data; None fetches it from the Hub.
        revision: Hub revision; None selects the newest. The manifest records the commit.
        suffix: ".jsonl" or ".parquet".
        limit: maximum number of rows read from each file or split, the first ones; for a trial.

    Raises:
        DataError: an unknown name, a data set that needs `local`, nothing to read, or rows of another schema.
    """
    spec = published(name)
    if suffix not in FORMATS:
        raise DataError(f"format '{suffix.lstrip('.')}': expected {' or '.join(ending.lstrip('.') for ending in FORMATS)}.")
    if limit is not None and limit < 1:
        raise DataError(f"limit: got {limit}, expected at least 1 row.")
    if local is not None and revision is not None:
        raise DataError("--revision is for data from the Hub, --from for a local copy. Give only one of the two.")
    ending = ".txt" if spec.text_lines else suffix
    manifest = out_dir / f"{name}.manifest.yaml"
    check_files([manifest, *(out_dir / f"{part.output}{ending}" for part in spec.parts)])  # before anything is fetched
    commit = None if local is not None else _commit(name, spec, revision)
    inputs = _local_inputs(spec, local) if local is not None else _hub_inputs(spec, commit)
    dropped: Counter[str] = Counter()
    outputs: list[dict[str, Any]] = []
    paths = [out_dir / f"{item.output}{ending}" for item in inputs]
    check_files([*paths, manifest], () if local is None else data_files(local))
    for item, path in zip(inputs, paths, strict=True):
        outputs.append(_write(spec, item, path, limit) | {"path": str(path.relative_to(out_dir))})
        dropped.update(outputs[-1]["dropped"])
    use = spec.use.format(out=out_dir).replace(".jsonl", suffix)
    content = {
        "name": name,
        "source": spec.source,
        "license": spec.license,
        "filters": spec.filters,
        "hub": spec.hub if local is None else None,
        "commit": commit,
        "from": None if local is None else str(local),
        "limit": limit,
        "rows": sum(output["rows"] for output in outputs),
        "dropped": dict(sorted(dropped.items())),
        "use": use,
        "files": outputs,
    }
    write_report(manifest, content)
    return Prepared(tuple(out_dir / output["path"] for output in outputs), manifest, content["rows"], dropped, use)


def _write(spec: Published, item: _Input, path: Path, limit: int | None) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    with RowWriter(path) as writer:
        for row in _converted(spec, item, limit, dropped):
            # one line a text, as the published files have them
            writer.write({"text": " ".join(row["text"].split())} if spec.text_lines else row)
        if not writer.num_rows:
            why = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "it has none"
            raise DataError(f"{item.origin}: no row is left ({why}).")
    logger.info("%s: %d rows, %d left out", path, writer.num_rows, dropped.total())
    return {"rows": writer.num_rows, "dropped": dict(sorted(dropped.items())), "from": item.origin, "sha256": file_hash(path)}


def _converted(spec: Published, item: _Input, limit: int | None, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    parser = RowParser(spec.kind)
    for number, (location, row) in enumerate(item.rows()):
        if limit is not None and number >= limit:
            return
        try:
            if not isinstance(row, Mapping):
                raise RowError("(row)", describe(row), "an object with named columns")
            converted = spec.convert(row, item.stem, number)
            for part in [converted] if isinstance(converted, Mapping) else converted:
                yield record_row(parser(part))
        except Dropped as reason:
            dropped[str(reason)] += 1
        except EmptyTextError as error:
            dropped[error.reason] += 1
        except RowError as error:
            raise DataError(f"{item.origin}, {location}, {error}") from error


def _local_inputs(spec: Published, local: Path) -> list[_Input]:
    files = data_files(local)
    if not spec.parts:
        return _file_inputs(spec, files, local)
    return [_Input(str(local), part.output, part.output, _chained(_of_split(part, files, spec, local))) for part in spec.parts]


def _of_split(part: Part, files: list[Path], spec: Published, local: Path) -> list[Path]:
    """The files of a split: those whose names begin with its name; all files if the data set has only one split."""
    if len(spec.parts) == 1:
        return files
    own = [file for file in files if file.name.startswith(part.split)]
    if not own:
        names = ", ".join(file.name for file in files[:5])
        raise DataError(
            f"{local} has no file of the split '{part.split}': found {names}, expected {part.split}*.parquet or .jsonl."
        )
    return own


def _chained(files: list[Path]) -> Callable[[], Rows]:
    def rows() -> Rows:
        """Yield (file and location, row) of all files in order."""
        for file in files:
            yield from ((f"{file.name}, {location}", row) for location, row in read_rows(file))

    return rows


def _file_inputs(spec: Published, files: list[Path], root: Path) -> list[_Input]:
    """One input per file, written side by side; where two files have one name, each in a folder named as its own.

    Raises:
        DataError: two files of one folder differ only in their extension.
    """
    stems = [Path(file.name.removesuffix(".gz")).stem for file in files]
    names = [file.name for file in files]
    if len(set(stems)) < len(stems):
        names = [str(file.relative_to(root)) for file in files]
    outputs = output_names(names, "")
    return [
        _Input(str(file), stem, str(Path(spec.folder, output)), partial(read_rows, file))
        for file, stem, output in zip(files, stems, outputs, strict=True)
    ]


def _hub_inputs(spec: Published, commit: str | None) -> list[_Input]:
    assert spec.hub is not None
    if not spec.parts:
        return _downloaded(spec, commit)
    inputs = []
    for part in spec.parts:
        config = replace(SourceConfig(hub=spec.hub, subset=part.subset, split=part.split), revision=commit)
        name, _, rows = hub_rows(config)
        inputs.append(_Input(f"Hub data set {name}", part.output, part.output, rows))
    return inputs


def _downloaded(spec: Published, commit: str | None) -> list[_Input]:
    from huggingface_hub import snapshot_download

    assert spec.hub is not None
    try:
        folder = snapshot_download(spec.hub, repo_type="dataset", revision=commit, allow_patterns=list(spec.files))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot fetch {spec.hub} from the Hub: {error} Give a copy with --from FOLDER.") from error
    return _file_inputs(spec, data_files(Path(folder)), Path(folder))


def _commit(name: str, spec: Published, revision: str | None) -> str:
    """Resolve a revision to its current commit, which the manifest records.

    Raises:
        DataError: the data set is not on the Hub, or the Hub does not answer.
    """
    if spec.hub is None:
        raise DataError(f"{name} needs --from FOLDER. {spec.missing}")
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(spec.hub, revision=revision).sha
    except (OSError, ValueError) as error:
        raise DataError(f"cannot reach {spec.hub} on the Hub: {error} Give a copy with --from FOLDER.") from error
    assert commit is not None, "the Hub names a commit for every revision"
    return commit
