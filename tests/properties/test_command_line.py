"""Whatever is asked of a command: it does it, or says in one message what is wrong and leaves the folder as it was."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.cli.all_commands import commands, parser_of
from tests.properties.cases import MANY, Case, run_cases
from tests.properties.places import DAMAGED, Place, damages
from unified_lm.cli.arguments import device, finite, from_zero, positive, whole
from unified_lm.cli.main import main
from unified_lm.evaluation.analyses import ANALYSES, GROUPS

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
MODELS = st.sampled_from(
    ["run", "sweep", "adapter", "adapter", "missing", "no/such/model", "texts.txt", "folder", "", "~nobody_of_that_name"]
)
RUNS = st.sampled_from(["sweep", "sweep", "missing", "folder", "texts.txt", "", "x" * 300, "export"])
DEVICES = st.sampled_from(["cpu", "cuda", "cuda:99", "banana", "meta", "", "cpu:3", "mps", "xla", "cpu:-1"])
DTYPES = st.sampled_from(["float32", "auto", "bfloat16", "banana", "", "int8", "float8_e4m3fn", "complex64", "dtype", "bool"])
NUMBERS = st.sampled_from(["1", "2", "0", "-1", "nan", "inf", "1e400", "9" * 5000, "9" * 30, "a", "", "1.5", "²"])
WORDS = st.sampled_from(
    [
        *("", "-", "a query", "\udcff", "mean", "causal", "bidirectional", "grit", "plain", "last_token", "none", "os.system"),
        "x" * 5000,
    ]
)

FOLDERS = st.sampled_from(["vectors", "vectors", "index", "index", "new", "folder", "texts.txt"])

Slots = Mapping[str, st.SearchStrategy[str]]
SLOTS: Slots = {
    "P": PATHS,
    "O": OUTPUTS,
    "F": FOLDERS,
    "M": MODELS,
    "R": RUNS,
    "D": DEVICES,
    "T": DTYPES,
    "N": NUMBERS,
    "W": WORDS,
}

EMBEDDING = ("--template <W>", "--pooling <W>", "--attention <W>", "--method rw", "--method <W>", "--alpha <N>")

FORMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "encode": ("<export|M> <texts.txt|P> --out <out.npy|O>", ("--device <D>", "--dtype <T>", "--instruction <W>", *EMBEDDING)),
    "embed": (
        "<texts.txt|P> --model <export|M> --out <F>",
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
        "<texts.txt|P> --model <export|M> --out <F>",
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
    "ask": ("<index|F> <W> --max-new-tokens 2", ("--mode <W>", "-k <N>", "--rerank <W>", "--model <M>", "--device <D>")),
    "chat": ("<index|F>", ("--mode <W>", "--model <M>")),
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


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A command line, and damage to one of the folders that it names, if to any."""
    arguments = draw(command_lines())
    named = [folder for folder in DAMAGED if any(re.search(rf"\b{folder}\b", word) for word in arguments)]
    folder = draw(st.sampled_from([None, *(named or DAMAGED)]))
    return {"arguments": arguments, "damage": None if folder is None else (folder, draw(damages(folder, DAMAGED[folder])))}


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
"""Of hidden files after success: locks, and what the same command goes on from after an interruption."""
_STAYS: Mapping[str, str] = {
    "index": "a folder is begun before its documents are read",
    "train": "a folder is taken before its data are read",
    "data mine": "vectors and finished blocks, from which the job goes on",
    "analyze": "what was measured before the error, which the next call does not measure again",
    "eval mteb": "results of the tasks before the one that failed",
}
"""Command -> what it may leave where it ends in a message; every other one leaves the folder as it was."""


def _tree(root: Path) -> dict[str, tuple[int, int] | None]:
    """Everything below a folder: size and time of its files, None for folders."""
    found = {}
    for path in root.rglob("*"):
        state = path.lstat()
        found[str(path.relative_to(root))] = None if path.is_dir() else (state.st_size, state.st_mtime_ns)
    return found


def _name(arguments: list[str]) -> str:
    whole = " ".join(arguments[:2])
    return whole if whole in FORMS and not whole.startswith("analyze ") else arguments[0] if arguments else ""


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place = Place(root, case)
        out, err, before = StringIO(), StringIO(), _tree(root)
        with working_in(place.root), redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"what is it\n\xff\n")))
            code = main(case["arguments"])
        assert code in (0, 2), (code, err.getvalue())
        if code and case["arguments"]:
            assert "error: " in err.getvalue(), err.getvalue()
            assert "Traceback" not in err.getvalue() or "Exception ignored in" in err.getvalue(), err.getvalue()
            assert len(err.getvalue()) < 20_000, "a message of thousands of characters"
        if code == 2 and _name(case["arguments"]) not in _STAYS:
            changed = dict(_tree(root).items() ^ before.items())
            assert not changed, f"it left or changed {sorted(changed)}"
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
    run_cases(cases(), check, 12)


@pytest.mark.slow
def test_many_commands_do_or_refuse() -> None:
    run_cases(cases(), check, MANY)
