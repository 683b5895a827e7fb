"""`unified-lm encode | search | generate`: use a finished model from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unified_lm.cli.arguments import (
    add_device_options,
    add_embedding_options,
    command_parser,
    embedding_options,
    from_zero,
    positive,
    read_stdin,
)
from unified_lm.core.errors import DataError
from unified_lm.core.outputs import check_file, write_file
from unified_lm.data.rows.readers import read_text_lines

if TYPE_CHECKING:
    from unified_lm.inference import UnifiedLM


def encode(argv: Sequence[str]) -> None:
    """Embed the lines of a file into a numpy array file."""
    parser = _parser(
        "encode",
        "embed the lines of a text file into a .npy file, float32 [lines, dimensions]",
        "runs/grit/export texts.txt --out vectors.npy",
    )
    parser.add_argument("texts", type=Path, help="a text file, one text per line")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    parser.add_argument("--instruction", default="", help="the task, for queries; none, as for documents, if left out")
    add_embedding_options(parser)
    options = parser.parse_args(list(argv))
    check_file(options.out)
    vectors = _load(options, **embedding_options(options)).encode(
        _lines(options.texts), options.instruction, show_progress=sys.stderr.isatty()
    )
    write_file(options.out, lambda path: _save(path, vectors))
    print(f"{options.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} dimensions")


def _save(path: Path, vectors: np.ndarray) -> None:
    with open(path, "wb") as handle:  # a handle, because np.save adds .npy to other names
        np.save(handle, vectors)


def search(argv: Sequence[str]) -> None:
    """Print the lines of a file that are most similar to a query."""
    parser = _parser(
        "search",
        "find the lines of a text file that are most similar to a query",
        'runs/grit/export "read a file line by line" texts.txt -k 3',
    )
    parser.add_argument("query", help="the text to search for")
    parser.add_argument("documents", type=Path, help="a text file, one document per line")
    parser.add_argument("--instruction", default=None, help="the task; by default the export's own")
    parser.add_argument("-k", type=positive, default=5, help="results (5)")
    add_embedding_options(parser)
    options = parser.parse_args(list(argv))
    texts = _lines(options.documents)
    for hit in _load(options, **embedding_options(options)).search(options.query, texts, options.k, options.instruction)[0]:
        print(f"{hit.score:.3f}  {texts[hit.index]}")


def generate(argv: Sequence[str]) -> None:
    """Print the answer to one message."""
    parser = _parser("generate", "answer one message", 'runs/grit/export "What does json.loads do?" --max-new-tokens 60')
    parser.add_argument("message", help='the message; "-" reads it from stdin')
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="limit of the answer in tokens (256)")
    parser.add_argument(
        "--temperature", type=from_zero, default=0.0, help="sampling temperature; 0.0 (the default) takes the most likely token"
    )
    options = parser.parse_args(list(argv))
    message = read_stdin() if options.message == "-" else options.message
    print(_load(options).generate(message, max_new_tokens=options.max_new_tokens, temperature=options.temperature))


def _parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = command_parser(name, description, example)
    parser.add_argument("model", help="a run or its export folder, or a Hub name")
    add_device_options(parser, dtype="auto")
    return parser


def _load(options: argparse.Namespace, **chosen: Any) -> UnifiedLM:
    from unified_lm.inference import UnifiedLM  # takes seconds to import, which --help can do without

    return UnifiedLM.from_pretrained(options.model, device=options.device, dtype=options.dtype, **chosen)


def _lines(path: Path) -> list[str]:
    """The texts of a file, one per line (see `read_text_lines`); an empty line is an error, since results are counted by line.

    Raises:
        DataError: no such file, or an empty line.
    """
    texts = read_text_lines(path)
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"{path}, line {number} is empty; every line is one text.")
    return texts
