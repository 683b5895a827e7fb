"""Whatever is asked of a command: it does it, or says in one message what is wrong. Never a traceback, never a stray file."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.cli.all_commands import commands, parser_of
from tests.inference.conftest import make_export
from tests.properties.cases import MANY, VALUES, Case, mutated, run_cases, to_json
from tests.reporting.test_report import write_run
from unified_lm.cli.arguments import device, finite, from_zero, positive, whole
from unified_lm.cli.main import main
from unified_lm.evaluation.analyses import ANALYSES, GROUPS

# --- a folder of things to name ------------------------------------------------------------------------------------------


@cache
def _originals() -> Path:
    """A folder with an export and a run, made once per process."""
    root = Path(tempfile.mkdtemp(prefix="unified_lm_properties_"))
    make_export(root / "export")
    write_run(root / "run")
    (root / "sweep").mkdir()
    for name in ("a-seed1", "b-seed1"):
        write_run(root / "sweep" / name)
    (root / "sweep" / "sweep.json").write_text(json.dumps({"recipe": "r", "base": "b", "arms": ["a", "b"]}))
    table = {"title": "t", "columns": ["a"], "rows": [[1]], "note": "n"}
    (root / "run" / "evaluation").mkdir()
    (root / "run" / "evaluation" / "t.json").write_text(json.dumps(table))
    result = {"task_name": "STS", "scores": {"test": [{"hf_subset": "default", "main_score": 0.5}]}}
    (root / "run" / "mteb" / "results" / "m" / "r").mkdir(parents=True)
    (root / "run" / "mteb" / "results" / "m" / "r" / "STS.json").write_text(json.dumps(result))
    return root


JSON_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "unified_lm.json", "generation_config.json", "modules.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json", "special_tokens_map.json"),
)
RUN_FILES = ("run.json", "metrics.jsonl", "config.yaml", "validation/step-00000004.json", "evaluation/t.json")
RUN_FILES += ("mteb/results/m/r/STS.json",)
_LINE = {"step": 4, "heldout/embedding": 1.0, "retrieval/ndcg@10": 0.75, "loss": 2.0, "step_seconds": 2.0}


def _values_of(root: str, name: str) -> Any:
    path = _originals() / root / name
    if name == "metrics.jsonl" or not path.is_file() or path.suffix == ".safetensors":
        return _LINE if name == "metrics.jsonl" else {"a": 1}
    if path.suffix == ".yaml":
        return {"recipe": "grit_smollm2", "max_steps": 4, "seed": 7, "optim": {"learning_rate": 1e-5}}
    return json.loads(path.read_text())


def _damages(root: str, names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, str, Any]]:
    """(file, how, content) of a damage."""

    def of(name: str) -> st.SearchStrategy[tuple[str, str, Any]]:
        value = _values_of(root, name)
        changed = st.one_of(mutated(value), mutated(value, 1), VALUES)
        return st.one_of(
            changed.map(lambda new: (name, "value", new)),
            st.sampled_from(["gone", "empty", "half", "bytes", "folder", "deep"]).map(lambda how: (name, how, None)),
        )

    return st.sampled_from(names).flatmap(of)


def _damage(folder: Path, name: str, how: str, new: Any) -> None:
    path = folder / name
    old = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "value" and name == "metrics.jsonl":
        path.write_bytes(old + to_json(new) + b"\n" + to_json({"step": 5, "heldout/embedding": 0.5, "loss": 1.0}) + b"\n")
    elif how != "gone":
        contents = {"empty": b"", "half": old[: len(old) // 2], "bytes": b"\xff\xfe\0garbage", "deep": b"[" * 100_000}
        path.write_bytes(to_json(new) if how == "value" else contents[how])


class Place:
    """A user's folder for one command."""

    def __init__(self, root: Path, case: Case) -> None:
        self.root = root
        (root / "texts.txt").write_text("one text of several words\nanother text of several words\n")
        (root / "pairs.jsonl").write_text('{"query": "what is it", "pos": ["it is this"]}\n{"query": "q", "pos": ["p"]}\n')
        (root / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n[1]\n')
        (root / "empty.txt").write_text("")
        (root / "conll.txt").write_text("a DT\ntext NN\n\nanother DT\ntext NN\n")
        (root / "folder").mkdir()
        (root / "task").mkdir()
        (root / "task" / "task.yaml").write_text("type: sts\n")
        rows = [{"sentence1": "a text", "sentence2": f"text {i}", "score": i} for i in range(3)]
        (root / "task" / "test.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in rows))
        shutil.copytree(_originals() / "export", root / "export", copy_function=os.link)
        shutil.copytree(_originals() / "run", root / "run")
        shutil.copytree(_originals() / "sweep", root / "sweep")
        for folder in ("export", "run"):
            if case["damage"] is not None and case["damage"][0] == folder:
                _damage(root / folder, *case["damage"][1])


LONG = ("x" * 300, "y/" * 3000)
PATHS = st.sampled_from(
    [
        *("texts.txt", "pairs.jsonl", "bad.jsonl", "empty.txt", "folder", "missing.txt", "no/such/file.txt", "task", "run"),
        *(*LONG, "~nobody_of_that_name/x", "texts.txt/below", ".", "", "/dev/null", "/proc/self/mem", "export"),
    ]
)
OUTPUTS = st.sampled_from(
    [
        *(
            "out.npy",
            "out.jsonl",
            "out.parquet",
            "out.txt",
            "out.json",
            "out.yaml",
            "out.html",
            "new/folder",
            "folder",
            "texts.txt",
        ),
        *(*LONG, "x" * 254, "texts.txt/below", "~nobody_of_that_name/x", ".", "", "/proc/out", "/dev/full"),
    ]
)
MODELS = st.sampled_from(["run", "sweep", "missing", "no/such/model", "texts.txt", "folder", "", "~nobody_of_that_name"])
RUNS = st.sampled_from(["sweep", "sweep", "missing", "folder", "texts.txt", "", "x" * 300, "export"])
DEVICES = st.sampled_from(["cpu", "cuda", "cuda:99", "banana", "meta", "", "cpu:3", "mps", "xla", "cpu:-1"])
DTYPES = st.sampled_from(["float32", "auto", "bfloat16", "banana", "", "int8", "float8_e4m3fn", "complex64", "dtype", "bool"])
NUMBERS = st.sampled_from(["1", "2", "0", "-1", "nan", "inf", "1e400", "9" * 5000, "9" * 30, "a", "", "1.5", "²"])
WORDS = st.sampled_from(
    ["", "a query", "\udcff", "mean", "causal", "bidirectional", "grit", "plain", "last_token", "none", "os.system", "x" * 5000]
)

Slots = Mapping[str, st.SearchStrategy[str]]
SLOTS: Slots = {"P": PATHS, "O": OUTPUTS, "M": MODELS, "R": RUNS, "D": DEVICES, "T": DTYPES, "N": NUMBERS, "W": WORDS}

EMBEDDING = ("--template <W>", "--pooling <W>", "--attention <W>", "--method rw", "--method <W>", "--alpha <N>")

FORMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "encode": ("<export|M> <texts.txt|P> --out <out.npy|O>", ("--device <D>", "--dtype <T>", "--instruction <W>", *EMBEDDING)),
    "embed": (
        "<texts.txt|P> --model <export|M> --out <new|O>",
        ("--shard-rows <N>", "--form <W>", "--column <W>", "--instruction <W>", "--device <D>", *EMBEDDING),
    ),
    "search": ("<export|M> <W> <texts.txt|P>", ("--device <D>", "--dtype <T>", "-k <N>", "--instruction <W>", *EMBEDDING)),
    "generate": ("<export|M> <W> --max-new-tokens 2", ("--device <D>", "--dtype <T>", "--temperature <N>")),
    "standardize": (
        "<export|M> --corpus <texts.txt|P> --out <new|O>",
        ("--num-texts <N>", "--device <D>", "--dtype <T>", "--method <W>", "--alpha <N>", "--tune-on <P>"),
    ),
    "upcycle": (
        "<export|M> --out <new|O> --experts 2",
        ("--experts <N>", "--top-k <N>", "--parts <N>", "--drop <N>", "--noise <N>", "--router-std <N>"),
    ),
    "experts routing": (
        "<export|M> --data a=<texts.txt|P> b=<pairs.jsonl|P> --out <new|O>",
        ("--context <N>", "--documents <N>", "--device <D>", "--dtype <T>", "--template <W>"),
    ),
    "experts domains": ("<P> --out <new|O>", ("--ratio <N>", "--min-tokens <N>")),
    "experts contexts": (
        "<export|M> --data a=<texts.txt|P> --out <out.json|O>",
        ("--top <N>", "--context <N>", "--features neurons", "--layers <N>", "--features <W>"),
    ),
    "experts explain": (
        "<export|M> --contexts <P> --experts 0:0,0",
        ("--experts <W>", "--question <W>", "--max-new-tokens <N>"),
    ),
    "experts page": (
        "<export|M> --data a=<texts.txt|P> b=<pairs.jsonl|P> --out <out.html|O>",
        ("--most <N>", "--top <N>", "--documents <N>"),
    ),
    "experts correlate": (
        "<export|M> --data <pairs.jsonl|P> --score <W> --out <new|O>",
        ("--text <W>", "--above <N>", "--context <N>", "--device <D>"),
    ),
    "experts edit": (
        "<export|M> --mask <P> --data a=<texts.txt|P>",
        ("--out <O>", "--statistics <P>", "--draws <N>", "--context <N>"),
    ),
    "export": ("<run|R>", ("--out <O>", "--step <N>", "--for <vllm-embed|W>", "--for tei", "--pool-prompt")),
    "plot": ("<run|R>", ("--out <O>", "<sweep|R>")),
    "compare": ("<run|R>", ("--out <O>", "<sweep|R>", "--reference <W>")),
    "report": ("<run|R>", ("--out <O>",)),
    "eval perplexity": (
        "<export|M> --data a=<texts.txt|P> --context 8 --documents 2",
        ("--out <O>", "--device <D>", "--dtype <T>", "--stride <N>", "--template <W>"),
    ),
    "eval mteb": (
        "<export|M> --tasks <./task|P> --prompts <out.json|O>",
        ("--instructions <P>", "--device <D>", *EMBEDDING),
    ),
    "eval words": (
        "<export|M> --data conll:<conll.txt|P>,<conll.txt|P>",
        ("--out <O>", "--device <D>", "--columns word=<N>", "--subtoken <W>", "--probe <W>", "--attention <W>"),
    ),
    "index": (
        "<texts.txt|P> --model <export|M> --out <new|O>",
        (
            "--column <W>",
            "--limit <N>",
            "--engine <W>",
            "--states <none|W>",
            "--form <int8|W>",
            "--budget-gb <N>",
            "--device <D>",
        ),
    ),
    "ask": ("<new|O> <W> --max-new-tokens 2", ("--mode <W>", "-k <N>", "--rerank <W>", "--model <M>", "--device <D>")),
    "chat": ("<new|O>", ("--mode <W>", "--model <M>")),
    "eval rag": ("<export|M> --data <pairs.jsonl|P> --generate 0", ("--out <O>", "-k <N>", "--modes <W>", "--limit <N>")),
    "eval lm": ("<export|M> --tasks <P>", ("--out <O>", "--device <D>", "--include-path <P>", "--limit <N>")),
    **{
        f"analyze {name}": (
            "<export|M> --texts <texts.txt|P> --out <new|O> --num-windows 2 --positions 4",
            ("--device <D>", "--dtype <T>", "--overwrite", *EMBEDDING),
        )
        for name in (*ANALYSES, *GROUPS, "no_such_analysis")
    },
    "data overlap": (
        "<pairs.jsonl|P> <texts.txt|P>",
        ("--write <O>", "--report <O>", "--ngram <N>", "--near <N>", "--kinds <W>", "--columns <W>"),
    ),
    "data mine": (
        "<pairs.jsonl|P> --model <export|M> --out <out.jsonl|O>",
        ("--corpus <P>", "--shard <N>/<N>", "--negatives <N>", "--device <D>", "--cache <O>", "--columns <W>=<W>"),
    ),
    "data prepare": ("<medi2|W> --from <pairs.jsonl|P> --out <new|O>", ("--limit <N>", "--format parquet", "--revision <W>")),
    "inspect": (
        "recipe=grit_smollm2 model=tiny_random out=<new|O> streams.embedding.sources=[{path:<pairs.jsonl|P>}]",
        ("<W>", "recipe=<P>"),
    ),
    "train": (
        "recipe=grit_smollm2 model=tiny_random dry_run=true run_dir=<new|O>",
        ("<W>", "recipe=<P>", "resume=<P>", "model.init_from=<M>"),
    ),
    "recipes": ("", ("<W>",)),
    "demo": ("<W>=<W>", ()),
}
"""Per command its arguments, and options that may follow: <X> is drawn from the slot X, <a|X> is mostly a."""

_OF_KEYS = ("train", "inspect", "recipes", "demo")
"""Commands that take `key=value` and no options."""
_BY_KIND = {positive: "<2|N>", whole: "<1|N>", finite: "<1|N>", from_zero: "<1|N>", device: "<D>", Path: "<P>"}


@cache
def options_of(name: str) -> tuple[str, ...]:
    """The options that may follow a command: those of its form, and every other one of its parser, by type."""
    written = FORMS[name][1]
    if name in _OF_KEYS or (name == "eval words" and find_spec("seqeval") is None):
        return written
    known = " ".join((FORMS[name][0], *written)).split()
    with pytest.MonkeyPatch.context() as patch:
        actions = parser_of(commands()[name.split()[0] if name.startswith("analyze") else name], patch)._actions
    return (
        *written,
        *(_drawn(action) for action in actions if action.option_strings and not set(action.option_strings) & set(known)),
    )


def _drawn(action: argparse.Action) -> str:
    """An option of a parser as a form."""
    option = action.option_strings[-1]
    if action.nargs == 0:
        return option
    if action.choices:
        return f"{option} <{next(iter(action.choices))}|W>"
    return f"{option} {'<T>' if option == '--dtype' else '<O>' if option == '--out' else _BY_KIND.get(action.type, '<W>')}"


_SLOT = re.compile(r"<(?:([^|>]*)\|)?([A-Z])>")


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """The arguments of a command."""
    name = draw(st.sampled_from(sorted(FORMS)))
    form, options = FORMS[name][0], options_of(name)
    chosen = draw(st.lists(st.sampled_from(options), max_size=2)) if options else []

    def value(match: re.Match[str]) -> str:
        """What takes the place of a slot."""
        good, slot = match.groups()
        return good if good and draw(st.integers(0, 5)) else draw(SLOTS[slot])

    words = [*name.split(), *form.split(), *(word for option in chosen for word in option.split())]
    filled = [_SLOT.sub(value, word) for word in words]
    if draw(st.integers(0, 19)) == 0 and name != "demo":  # which trains for minutes unless a word of its own stops it
        del filled[draw(st.integers(0, len(filled) - 1))]
    return filled


CASES = st.fixed_dictionaries(
    {
        "arguments": command_lines(),
        "damage": st.one_of(
            st.none(),
            st.deferred(lambda: _damages("export", (*JSON_FILES, "model.safetensors"))).map(lambda damage: ("export", damage)),
            st.deferred(lambda: _damages("run", RUN_FILES)).map(lambda damage: ("run", damage)),
        ),
    }
)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The working directory for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


_KEPT = (".lock", ".parts")
"""Of hidden files: locks, and what the same command goes on from after an interruption."""


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place = Place(root, case)
        out, err = StringIO(), StringIO()
        with working_in(place.root), redirect_stdout(out), redirect_stderr(err):
            code = main(case["arguments"])
        assert code in (0, 2), (code, err.getvalue())
        if code and case["arguments"]:
            assert "error: " in err.getvalue(), err.getvalue()
            assert "Traceback" not in err.getvalue() or "Exception ignored in" in err.getvalue(), err.getvalue()
            assert len(err.getvalue()) < 20_000, "a message of thousands of characters"
        left = [str(path) for path in root.rglob(".*") if path.name != ".unified_lm_written" and path.suffix not in _KEPT]
        assert not left, f"temporary files are left: {left}"


def test_every_command_has_a_form() -> None:
    assert {name for name in FORMS if not name.startswith("analyze ")} == set(commands()) - {"analyze"}


def test_every_option_is_drawn() -> None:
    """Those of the parsers, whatever the forms say; the list of a few shows that they are read at all."""
    assert {"--adapter", "--verify <full|W>", "--for tei"} <= set(options_of("export"))
    assert {"--triples <P>", "--clusters <2|N>", "--labels <W>"} <= set(options_of("analyze norms"))
    assert {"--near-duplicate <1|N>", "--skip-empty"} <= set(options_of("data mine"))


def test_commands_do_or_refuse() -> None:
    run_cases(CASES, check, 12)


@pytest.mark.slow
def test_many_commands_do_or_refuse() -> None:
    run_cases(CASES, check, MANY)
