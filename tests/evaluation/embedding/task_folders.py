"""Small task folders, one per kind, for tests."""

import json
from pathlib import Path

TOPICS = {
    "sea": [
        "waves roll over the sand",
        "the ship left the harbour",
        "a whale dives deep",
        "salt water stings",
        "tide and moon",
    ],
    "bread": ["knead the dough well", "the oven is hot", "yeast makes it rise", "a crust of rye", "flour on the table"],
}


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def describe(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    return folder


def sts(root: Path, name: str = "sts") -> Path:
    folder = describe(root / name, "type: sts\n")
    left, right = TOPICS["sea"], TOPICS["bread"]
    lines = [f"{a}\t{b}\t{index % 4 + 0.5}" for index, (a, b) in enumerate(zip(left + right, right + left, strict=True))]
    (folder / "test.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n", encoding="utf-8")
    return folder


def stsb(root: Path, shared: Path, rows: int | None = None, extra: str = "") -> Path:
    """STS-B dev: a table of tabs without header, named .csv."""
    folder = describe(
        root / "stsb",
        "type: sts\nname: STSBenchmark\nfiles: {test: dev.csv}\n"
        'delimiter: "\\t"\nheader: false\ncolumns: {score: 5, sentence1: 6, sentence2: 7}\n' + extra,
    )
    lines = (shared / "data" / "stsb" / "sts-dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "dev.csv").write_text("".join(lines[:rows]), encoding="utf-8")
    return folder


def classification(root: Path) -> Path:
    folder = describe(root / "classification", "type: classification\ncolumns: {text: sentence}\n")
    rows: list[dict[str, object]] = [{"sentence": text, "label": name} for name, texts in TOPICS.items() for text in texts]
    write_rows(folder / "train.jsonl", rows)
    (folder / "test.csv").write_text('sentence,label\n"a ship, far out",sea\nwarm dough,bread\n', encoding="utf-8")
    return folder


def clustering(root: Path) -> Path:
    folder = describe(root / "clustering", "type: clustering\n")
    write_rows(folder / "test.jsonl", [{"text": text, "label": name} for name, texts in TOPICS.items() for text in texts])
    return folder


def pairs(root: Path) -> Path:
    folder = describe(root / "pairs", "type: pair_classification\n")
    sea, bread = TOPICS["sea"], TOPICS["bread"]
    rows: list[dict[str, object]] = [{"sentence1": text, "sentence2": text, "label": 1} for text in sea]
    rows += [{"sentence1": a, "sentence2": b, "label": 0} for a, b in zip(sea, bread, strict=True)]
    write_rows(folder / "test.jsonl", rows)
    return folder


def reranking(root: Path) -> Path:
    folder = describe(root / "reranking", "type: reranking\ninstruction: Find the text about the same thing.\n")
    sea, bread = TOPICS["sea"], TOPICS["bread"]
    write_rows(folder / "test.jsonl", [{"query": text, "positive": [text], "negative": bread} for text in sea])
    return folder


def retrieval(root: Path, name: str = "SciFact") -> Path:
    """BEIR's layout; one query has no judgment, one document only a title."""
    folder = describe(root / "retrieval", f"type: retrieval\nname: {name}\n")
    texts = [text for group in TOPICS.values() for text in group]
    corpus: list[dict[str, object]] = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    write_rows(folder / "corpus.jsonl", [*corpus, {"_id": "d99", "title": "only a title", "text": ""}])
    queries: list[dict[str, object]] = [{"_id": f"q{i}", "text": f"{text} again"} for i, text in enumerate(texts)]
    write_rows(folder / "queries.jsonl", [*queries, {"_id": "q99", "text": "never judged"}])
    (folder / "qrels").mkdir(exist_ok=True)
    lines = [f"q{i}\td{(i + i % 3) % len(texts)}\t1" for i in range(len(texts))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n", encoding="utf-8")
    return folder
