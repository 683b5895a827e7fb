"""The published data sets that recipes use: where they are, which rows the papers exclude, and how rows are converted.

To add one, add an entry to `PUBLISHED`; `unified_lm.data.rows.prepare` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.data.rows.records import RecordKind
from unified_lm.data.rows.violations import RowError, describe


class Dropped(Exception):
    """A row is excluded by a paper's filter; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Part:
    """One split of a Hub data set, read through `datasets`.

    Attributes:
        split: name of the split.
        output: the output file, without extension.
        subset: configuration of the Hub data set.
    """

    split: str
    output: str
    subset: str | None = None


Convert = Callable[[Mapping[str, Any], str, int], Mapping[str, Any] | Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        kind: kind of its rows.
        hub: Hub name; None if it is not on the Hub and needs `--from`.
        license: license according to its card.
        source: paper or web page.
        use: the overrides that train on the result, quoted for a shell; ``{out}`` is the folder given to `--out`.
        filters: what is excluded, in words.
        parts: splits to read through `datasets`. If empty, `files` are fetched and read directly, one output each.
        files: patterns of files in the repository.
        folder: subfolder of the output folder for the outputs of `files` ("" for the folder itself).
        text_lines: write .txt, one text per line.
        convert: (row, name of its file, number of the row in it from 0) -> one or several rows that the readers accept;
            raises `Dropped`.
        missing: if `hub` is None: the reason, and alternatives.
    """

    kind: RecordKind
    hub: str | None
    license: str
    source: str
    use: str
    filters: str = "rows with an empty text"
    parts: tuple[Part, ...] = ()
    files: tuple[str, ...] = ()
    folder: str = ""
    text_lines: bool = False
    convert: Convert = field(default=lambda row, name, number: row)
    missing: str = ""


def _tulu2(row: Mapping[str, Any], name: str, number: int) -> Mapping[str, Any]:
    """GritLM trains on Tulu 2 without its custom prompts about the model's origin (https://arxiv.org/abs/2402.09906)."""
    if "messages" not in row:
        raise RowError("messages", f"no such column among [{', '.join(row)}]", "the turns of a chat of Tulu 2")
    if _is_hard_coded(row.get("dataset")) or _is_hard_coded(row.get("id")):
        raise Dropped("custom prompt about the model's origin (hard_coded)")
    roles = {turn.get("role") for turn in row["messages"] or () if isinstance(turn, Mapping)}
    if "assistant" not in roles:
        raise Dropped("no assistant turn")
    return {"messages": row["messages"]}


def _is_hard_coded(value: object) -> bool:
    return isinstance(value, str) and value.rpartition(".")[2].startswith("hard_coded")


ECHO_INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text",
    ),
    "dureader": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "eli5_question_answer": ("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",),
    "fever": ("Given a claim, retrieve documents that support or refute the claim",),
    "hotpot_qa": ("Given a multi-hop question, retrieve documents that can help answer the question",),
    "miracl": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "mrtydi": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "msmarco_passage": ("Given a web search query, retrieve relevant passages that answer the query",),
    "msmarco_document": ("Given a web search query, retrieve relevant documents that answer the query",),
    "nq": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "quora_duplicates": (
        "Given a question, retrieve questions that are semantically equivalent to the given question",
        "Find questions that have the same meaning as the input question",
    ),
    "squad": ("Retrieve Wikipedia passages that answer the question",),
    "t2ranking": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "trivia_qa": ("Retrieve Wikipedia passages that answer the question",),
}
"""Query instructions of E5's public data (https://arxiv.org/abs/2401.00368); with two instructions, rows alternate."""

_SYMMETRIC = {"allnli_split2", "quora_duplicates_split1", "quora_duplicates_split2"}


def _echo(row: Mapping[str, Any], name: str, number: int) -> Mapping[str, Any]:
    """Give a row of the Echo folder its instruction.

    Files named ``..._split1`` and ``..._split2`` have one of the two instructions each, which documents of symmetric tasks then
    have as well. In undivided files the instructions alternate by row, and documents have none. Both follow LLM2Vec's
    released loader.
    """
    stem, _, split = name.partition("_split")
    if stem not in ECHO_INSTRUCTIONS:
        raise DataError(
            f"{name}: not one of the data sets that Echo and LLM2Vec train on.{did_you_mean(stem, ECHO_INSTRUCTIONS)} "
            "Leave only those in the folder, or read it as it is with data.echo_path."
        )
    choices = ECHO_INSTRUCTIONS[stem]
    if split and not (split.isdigit() and 1 <= int(split) <= len(choices)):
        raise DataError(f"{name}: expected {stem} or {stem}_split1 to {stem}_split{len(choices)}.")
    instruction = choices[int(split) - 1 if split else number % len(choices)]
    document = instruction if name in _SYMMETRIC else ""
    for column in ("query", "positive", "negative"):
        if not isinstance(row.get(column), str):
            got = describe(row[column]) if column in row else f"no such column among [{', '.join(row)}]"
            raise RowError(column, got, "a text")
    return {
        "query": [instruction, row["query"]],
        "pos": [[document, row["positive"]]],
        "neg": [[document, row["negative"]]],
    }


def _instructed(instruction: str) -> Callable[[Mapping[str, Any], str, int], Mapping[str, Any]]:
    """Make a converter that adds an instruction to queries of rows (query, pos, neg) or (anchor, positive, negative)."""

    def convert(row: Mapping[str, Any], name: str, number: int) -> Mapping[str, Any]:
        """Replace a query that is a bare string by [instruction, query]."""
        query = row.get("query", row.get("anchor"))
        changed = {key: value for key, value in row.items() if key not in ("query", "anchor")}
        return {**changed, "query": [instruction, query] if isinstance(query, str) else query}

    return convert


def _ultrafeedback(row: Mapping[str, Any], name: str, number: int) -> Sequence[Mapping[str, Any]]:
    """Convert a pair of answers to two rows, the better answer desirable and the other not, as trl does for KTO."""
    answers = {}
    for column in ("chosen", "rejected"):
        turns = row.get(column)
        last = turns[-1] if isinstance(turns, Sequence) and not isinstance(turns, str) and turns else None
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            got = describe(turns) if column in row else f"no such column among [{', '.join(row)}]"
            raise RowError(column, got, "turns of a chat that end with the assistant's")
        if len(row[column]) != 2:
            raise Dropped("more than one turn")
        answers[column] = last.get("content")
    if answers["chosen"] == answers["rejected"]:
        raise Dropped("both answers are equal")
    return [
        {"prompt": row.get("prompt"), "completion": answers["chosen"], "label": True},
        {"prompt": row.get("prompt"), "completion": answers["rejected"], "label": False},
    ]


def _open_questions(row: Mapping[str, Any], name: str, number: int) -> Mapping[str, Any]:
    """Convert a question of Tevatron's files, whose passages have a title and a text, to a grounded row."""
    passages = {}
    for column in ("positive_passages", "negative_passages"):
        found = row.get(column)
        if not isinstance(found, Sequence) or isinstance(found, str):
            got = describe(found) if column in row else f"no such column among [{', '.join(row)}]"
            raise RowError(column, got, "a list of passages with title and text")
        parts = [[str(p.get(key) or "").strip() for key in ("title", "text")] for p in found]
        passages[column] = ["\n".join(part for part in texts if part) for texts in parts]
    if not row.get("answers") or not passages["positive_passages"]:
        raise Dropped("no answer, or no passage that holds it")
    return {
        "query": [ECHO_INSTRUCTIONS["nq"][0], row.get("query")],
        "pos": passages["positive_passages"],
        "neg": passages["negative_passages"],
        "answers": row["answers"],
    }


_ROWS_FORMAT = "query, pos and neg with their instructions"
_MEDI_USE = "data=e5 data.e5={out}/"


def _medi(hub: str, folder: str) -> Published:
    """MEDI2 with or without BGE's negatives: folders of jsonl files, one per data set."""
    return Published(
        kind=RecordKind.PAIR,
        hub=hub,
        license="see its card: each data set has its own",
        source="https://arxiv.org/abs/2402.09906",
        use=_MEDI_USE + folder,
        files=("*.jsonl", "*.jsonl.gz"),
        folder=folder,
    )


PUBLISHED: Mapping[str, Published] = {
    "tulu2": Published(
        kind=RecordKind.CHAT,
        hub="allenai/tulu-v2-sft-mixture",
        license="ODC-BY; parts have licenses of their own, some non-commercial",
        source="https://arxiv.org/abs/2311.10702; filtered as in https://arxiv.org/abs/2402.09906",
        filters="custom prompts (hard_coded), rows without an answer or with an empty turn",
        use="data.tulu2={out}/tulu2.jsonl",
        parts=(Part("train", "tulu2"),),
        convert=_tulu2,
    ),
    "gritlm_tulu2": Published(
        kind=RecordKind.CHAT,
        hub="GritLM/tulu2",
        license="that of Tulu 2: ODC-BY, parts non-commercial",
        source="https://arxiv.org/abs/2402.09906 (the filtered copy that GritLM published)",
        filters="rows with an empty turn",
        use="data.tulu2={out}/gritlm_tulu2",
        files=("*.jsonl", "*.jsonl.gz", "*.parquet"),
        folder="gritlm_tulu2",
    ),
    "e5": Published(
        kind=RecordKind.PAIR,
        hub=None,
        license="several: each data set has its own",
        source="https://arxiv.org/abs/2402.09906 (E5S, 1.89 M rows)",
        use="data=e5 data.e5={out}/e5",
        folder="e5",
        missing=f"E5S was never published. Give a folder of jsonl files ({_ROWS_FORMAT}) with --from, or take medi2 or echo.",
    ),
    "echo": Published(
        kind=RecordKind.PAIR,
        hub=None,
        license="several: each data set has its own",
        source="https://arxiv.org/abs/2402.15449; LLM2Vec's supervised data",
        use="data=echo data.echo={out}/echo-data",
        folder="echo-data",
        convert=_echo,
        missing="It is not on the Hub: unpack the download that Echo embeddings' repository links to, and give it with --from.",
    ),
    "medi2": _medi("GritLM/MEDI2", "medi2"),
    "medi2bge": _medi("GritLM/MEDI2BGE", "medi2bge"),
    "wiki1m": Published(
        kind=RecordKind.TEXT,
        hub="princeton-nlp/datasets-for-simcse",
        license="CC BY-SA (Wikipedia)",
        source="https://arxiv.org/abs/2104.08821",
        filters="blank lines",
        use="data=wiki1m data.wiki1m={out}/wiki1m_for_simcse.txt",
        files=("wiki1m_for_simcse.txt",),
        text_lines=True,
    ),
    "wikitext": Published(
        kind=RecordKind.TEXT,
        hub="Salesforce/wikitext",
        license="CC BY-SA 3.0 and GFDL",
        source="https://arxiv.org/abs/1609.07843 (WikiText-103, raw)",
        filters="blank lines",
        use="data.wikitext103={out}/wikitext103/train.jsonl data.held_out.text={out}/wikitext103/validation.jsonl",
        parts=(
            Part("train", "wikitext103/train", "wikitext-103-raw-v1"),
            Part("validation", "wikitext103/validation", "wikitext-103-raw-v1"),
        ),
    ),
    "msmarco": Published(
        kind=RecordKind.PAIR,
        hub="sentence-transformers/embedding-training-data",
        license="MS MARCO: non-commercial research",
        source="https://arxiv.org/abs/1611.09268, triplets with mined negatives",
        use="data=files data.pairs_path={out}/msmarco-triplets.jsonl",
        files=("msmarco-triplets.jsonl.gz",),
        convert=_instructed("Given a web search query, retrieve relevant passages that answer the query"),
    ),
    "ultrafeedback": Published(
        kind=RecordKind.PREFERENCE,
        hub="HuggingFaceH4/ultrafeedback_binarized",
        license="MIT",
        source="https://arxiv.org/abs/2310.01377, binarized as for Zephyr (https://arxiv.org/abs/2310.16944)",
        filters="rows with an empty text, with equal answers or with more than one turn",
        use="data=ultrafeedback data.ultrafeedback_path={out}/ultrafeedback",
        parts=(Part("train_prefs", "ultrafeedback/train"), Part("test_prefs", "ultrafeedback/test")),
        convert=_ultrafeedback,
    ),
    "nq": Published(
        kind=RecordKind.GROUNDED,
        hub="Tevatron/wikipedia-nq",
        license="CC BY-SA 3.0",
        source="https://arxiv.org/abs/2004.04906 (Natural Questions with passages of Wikipedia)",
        filters="questions without an answer or a passage that holds it",
        use="data.nq={out}/nq/train.jsonl data.held_out.grounded={out}/nq/dev.jsonl",
        parts=(Part("train", "nq/train"), Part("dev", "nq/dev")),
        convert=_open_questions,
    ),
    "allnli": Published(
        kind=RecordKind.PAIR,
        hub="sentence-transformers/all-nli",
        license="that of SNLI (CC BY-SA 4.0) and MultiNLI",
        source="https://arxiv.org/abs/1508.05326, https://arxiv.org/abs/1704.05426",
        use="data=files data.pairs_path={out}/allnli.jsonl",
        parts=(Part("train", "allnli", "triplet"),),
        convert=_instructed(ECHO_INSTRUCTIONS["allnli"][0]),
    ),
}


def published(name: str) -> Published:
    """The data set with that name.

    Raises:
        DataError: there is no such data set.
    """
    if name not in PUBLISHED:
        raise DataError(f"unknown data set '{name}'.{did_you_mean(name, PUBLISHED)}")
    return PUBLISHED[name]
