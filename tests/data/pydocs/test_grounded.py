"""Grounded rows of the built-in data: the answer stands in the right document, word for word."""

import json
from pathlib import Path

from unified_lm.config.streams import RecordKind, SourceConfig
from unified_lm.data.pydocs.grounded import grounded_file, grounded_rows
from unified_lm.data.pydocs.negatives import object_name
from unified_lm.data.rows.parse import RowParser

PAIRS = [
    {
        "query": ["Find it", f"Turn number {i} around."],
        "pos": [["", f"pkg.mod{i % 3}.turn{i}(x{i}, y=1)\nIt turns. Then it stops. {i}"]],
    }
    for i in range(40)
]


def test_rows_are_questions_whose_answer_is_in_the_document() -> None:
    rows = list(grounded_rows(PAIRS))
    assert len(rows) == len(PAIRS)
    kinds = set()
    for row in rows:
        (document,) = (text for _, text in row["pos"])
        (answer,) = row["answers"]
        assert answer in document
        kinds.add(row["query"][1].split()[1])
        name = object_name(row)
        expected = {
            "Python": (f"Which Python object does this? Turn number {name.rpartition('turn')[2]} around.", name),
            "parameters": (f"Which parameters does {name} take?", document.partition("\n")[0].removeprefix(name)),
            "does": (f"What does the documentation of {name} say first?", "It turns."),
        }[row["query"][1].split()[1]]
        assert (row["query"][1], answer) == expected
        assert len(row["neg"]) == 7
        assert document not in [text for _, text in row["neg"]]
    assert kinds == {"Python", "parameters", "does"}


def test_the_file_is_read_as_grounded_rows_and_as_pairs(tmp_path: Path) -> None:
    pairs = tmp_path / "x" / "pairs-test.jsonl"
    pairs.parent.mkdir()
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    rows = [json.loads(line) for line in grounded_file(pairs).read_text().splitlines()]
    for row in rows:
        record = RowParser(RecordKind.GROUNDED)(row)
        assert RowParser(RecordKind.PAIR)(row) == record.pair
    assert SourceConfig.from_text("builtin:pydocs:grounded").subset == "grounded"
