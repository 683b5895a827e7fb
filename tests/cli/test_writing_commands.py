"""No command removes or replaces what it did not write: every writing command against a folder, a file, a link and a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path

import pytest

from tests.cli.all_commands import commands
from tests.core.test_outputs import forget_kinds
from tests.engine.small_run import small_run
from tests.inference.conftest import exported  # noqa: F401 - the fixture
from tests.reporting.test_report import write_run
from unified_lm.cli.experts import CORRELATION, DOMAINS, ROUTING
from unified_lm.cli.main import main
from unified_lm.cli.upcycle import UPCYCLED
from unified_lm.core.errors import OutputError
from unified_lm.core.outputs import FolderKind, write_file, write_folder, write_text_file
from unified_lm.export.manifest import ADAPTER, FOR_ENGINE, MERGED, STANDARDIZED

READERS = frozenset({"search", "generate", "recipes", "ask", "chat", "experts explain"})
"""Commands that write nothing."""


def tree(root: Path) -> dict[str, str]:
    """Every path under a folder with the hash of its content, or what it is."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        else:
            found[str(path)] = "folder" if path.is_dir() else blake2b(path.read_bytes()).hexdigest()
    return found


class Place:
    """A user's things, and the inputs of commands."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        (root / "in").mkdir(parents=True)
        self.texts = root / "in" / "texts.txt"
        self.texts.write_text("one text of several words\nanother text of several words\n")
        self.rows = root / "in" / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"query": f"what is {i}", "pos": [f"it is {i}"]}) + "\n" for i in range(4)))
        self.grounded = root / "in" / "grounded.jsonl"
        self.grounded.write_text('{"query": "who", "pos": ["it"], "answers": ["she"]}\n' * 2)
        self.run = write_run(root / "in" / "run")
        (root / "mine").mkdir()
        (root / "mine" / "thesis.txt").write_text("years of work")

    def take(self, target: Path, kind: str) -> None:
        """Put something of the user's where an output is to go."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")
        elif kind == "file":
            target.write_text('{"model": "years of work"}')
        elif kind == "link":
            target.symlink_to(self.root / "mine")
        elif kind == "dangling link":
            target.symlink_to(self.root / "nowhere")
        else:
            write_run(target)


Command = Callable[[Place, Path], list[str]]
"""(place, target) -> arguments of a command that writes to `target`."""


def _training(place: Place, run_dir: Path, *more: str) -> list[str]:
    return ["train", *small_run(place.root / "in", run_dir, "max_steps=1", *more)]


WHOLE: Mapping[str, Command] = {
    # a missing model, where that shows that the output is checked before the work
    "encode": lambda p, t: ["encode", str(p.root / "missing"), str(p.texts), "--out", str(t)],
    "export": lambda p, t: ["export", str(p.root / "missing"), "--out", str(t)],
    "export, engine": lambda p, t: ["export", str(p.model), "--for", "tei", "--out", str(t)],
    "export --adapter": lambda p, t: ["export", str(p.root / "missing"), "--adapter", "--out", str(t)],
    "experts routing": lambda p, t: ["experts", "routing", str(p.root / "missing"), "--data", f"a={p.texts}", "--out", str(t)],
    "experts domains": lambda p, t: ["experts", "domains", str(p.root / "missing"), "--out", str(t)],
    "experts contexts": lambda p, t: [
        *("experts", "contexts", str(p.root / "missing"), "--data", f"a={p.texts}", "--out", str(t)),
    ],
    "experts page": lambda p, t: ["experts", "page", str(p.root / "missing"), "--data", f"a={p.texts}", "--out", str(t)],
    "experts correlate": lambda p, t: [
        *("experts", "correlate", str(p.root / "missing"), "--data", str(p.rows), "--score", "s", "--out", str(t)),
    ],
    "experts edit": lambda p, t: [
        *("experts", "edit", str(p.root / "missing"), "--mask", "m", "--data", f"a={p.texts}", "--out", str(t)),
    ],
    "upcycle": lambda p, t: ["upcycle", str(p.root / "missing"), "--out", str(t)],
    "standardize": lambda p, t: ["standardize", str(p.root / "missing"), "--corpus", str(p.texts), "--out", str(t)],
    "train": lambda p, t: _training(p, t.parent, "export.enabled=true"),
    "report": lambda p, t: ["report", str(p.run), "--out", str(t)],
    "index": lambda p, t: ["index", str(p.texts), "--model", str(p.model), "--out", str(t)],
    "embed": lambda p, t: ["embed", str(p.texts), "--model", str(p.root / "missing"), "--out", str(t)],
    "data overlap": lambda p, t: ["data", "overlap", str(p.rows), str(p.texts), "--write", str(t)],
    "data overlap, report": lambda p, t: ["data", "overlap", str(p.rows), str(p.texts), "--report", str(t)],
    "data mine": lambda p, t: ["data", "mine", str(p.rows), "--model", str(p.root / "missing"), "--out", str(t)],
    "data mine, report": lambda p, t: [
        "data",
        "mine",
        str(p.rows),
        "--model",
        str(p.root / "missing"),
        "--out",
        str(t.parent / "m.jsonl"),
    ],
    "eval perplexity": lambda p, t: ["eval", "perplexity", str(p.model), "--data", f"a={p.texts}", "--out", str(t)],
    "eval mteb": lambda p, t: ["eval", "mteb", str(p.model), "--tasks", "STSBenchmark", "--prompts", str(t)],
    "eval words": lambda p, t: ["eval", "words", str(p.model), "--train-sentences", "5", "--out", str(t)],
    "eval rag": lambda p, t: ["eval", "rag", str(p.model), "--data", str(p.grounded), "--generate", "0", "--out", str(t)],
    "eval lm": lambda p, t: ["eval", "lm", str(p.model), "--tasks", "arc_easy", "--out", str(t)],
}
"""Commands whose output is the target itself."""

NAMES = {
    "encode": "v.npy",
    "eval perplexity": "out.txt",
    "train": "proj/export",
    "report": "page.html",
    "data overlap": "clean.jsonl",
    "data overlap, report": "overlap.yaml",
    "data mine": "mined.jsonl",
    "data mine, report": "m.report.yaml",
}

INSIDE: Mapping[str, tuple[Command, str]] = {
    "plot": (lambda p, t: ["plot", str(p.run), "--out", str(t)], "curves.html"),
    "compare": (lambda p, t: ["compare", str(p.run), "--out", str(t)], "compare.png"),
    "analyze": (lambda p, t: ["analyze", "norms", str(p.model), "--texts", str(p.texts), "--out", str(t)], "norms.png"),
    "inspect": (
        lambda p, t: ["inspect", *small_run(p.root / "in", p.root / "unused"), f"out={t}"],
        "attention_mask.png",
    ),
    "data prepare": (
        lambda p, t: ["data", "prepare", "medi2", "--from", str(p.rows), "--out", str(t)],
        "medi2.manifest.yaml",
    ),
    "train": (lambda p, t: _training(p, t), "config.yaml"),
}
"""Commands that write files into the target folder, with one of the files."""

KINDS = ("folder", "file", "link", "dangling link", "run")


@pytest.fixture
def place(tmp_path: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Place:  # noqa: F811
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path / "home", exported())


def refused(place: Place, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must change nothing, and say so; returns what it says."""
    if arguments[:2] == ["eval", "lm"]:
        pytest.importorskip("lm_eval")
    if arguments[0] == "train" or arguments[0] == "inspect":
        small_run(place.root / "in", place.root / "unused")  # its data is written before the comparison
    before = tree(place.root)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert any(text in message for text in ("nothing was changed", "belongs to another job", "is a file", "not a folder")), (
        message
    )
    assert tree(place.root) == before
    return message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", WHOLE)
def test_what_is_in_the_place_of_an_output_stays(
    command: str, kind: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    target = place.root / "out" / NAMES.get(command, "out.json")
    place.take(target, kind)
    refused(place, WHOLE[command](place, target), capsys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", INSIDE)
def test_what_has_the_name_of_a_file_that_is_written_stays(
    command: str, kind: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make, name = INSIDE[command]
    target = place.root / "out"
    target.mkdir()
    place.take(target / name, kind)
    refused(place, make(place, target), capsys)


@pytest.mark.parametrize("command", INSIDE)
def test_a_file_does_not_become_a_folder(command: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    target = place.root / "out"
    target.write_text("mine")
    refused(place, INSIDE[command][0](place, target), capsys)


def test_a_run_is_not_replaced_by_its_own_export(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(place, ["export", str(place.run), "--out", str(place.run)], capsys)


FOLDERS: Mapping[str, FolderKind] = {
    "export": MERGED,
    "export, engine": FOR_ENGINE,
    "export --adapter": ADAPTER,
    "upcycle": UPCYCLED,
    "standardize": STANDARDIZED,
    "train": MERGED,
    "experts routing": ROUTING,
    "experts domains": DOMAINS,
    "experts correlate": CORRELATION,
}
"""Commands whose output is a folder, which is replaced as a whole, and its kind."""

EMPTY_PLACES = ("index", "embed")
"""Commands that fill a folder of their own step by step, and begin in an empty one."""


def with_each_input_in_the_output(command: str, place: Place, target: Path) -> Iterator[list[str]]:
    """A command's arguments, once for each of its inputs that could be the output, or lie in it.

    Each time the output is made anew, as this package's own: by its record alone it could be replaced.
    """
    arguments = WHOLE[command](place, target)
    outputs = {str(target), str(target.parent), str(target.parent / "m.jsonl")}
    for index, argument in enumerate(arguments):
        name, equals, value = argument.rpartition("=")
        if not os.path.isabs(value) or value in outputs or name.startswith(("run_dir", "streams")):
            continue
        source = Path(value)
        content = source.read_bytes() if source.is_file() else b"years of work"
        if command not in FOLDERS and command not in EMPTY_PLACES:
            if source.is_dir():
                continue  # a folder cannot be the file that is written
            target.unlink(missing_ok=True)
            write_file(target, lambda path, content=content: path.write_bytes(content))
            read = target
        else:
            read = target / (source.name if source.suffix else "inner.txt")
            write_folder(
                target,
                FOLDERS.get(command, MERGED),
                lambda path, name=read.name, content=content: (path / name).write_bytes(content),
            )
        yield [*arguments[:index], f"{name}{equals}{read}", *arguments[index + 1 :]]


NO_SUCH_INPUT = frozenset(
    {"train", "export", "export --adapter", "export, engine", "data overlap, report", "data mine, report"}
)
"""Commands that refuse such an input for another reason: a run that is none, rows in a .yaml file."""


@pytest.mark.parametrize("command", sorted(set(WHOLE) - NO_SUCH_INPUT))
def test_an_input_is_not_replaced(command: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where this package wrote it: by the record alone it could be replaced."""
    target = place.root / "out" / NAMES.get(command, "out.json")
    tried = 0
    for arguments in with_each_input_in_the_output(command, place, target):
        refused(place, arguments, capsys)
        tried += 1
    assert tried or command in ("report", "eval mteb", "eval words", "eval lm"), "of these a model or a run is the only input"


@pytest.mark.parametrize("command", ["experts routing", "standardize", "upcycle", "export, engine", "index"])
def test_the_export_of_a_run_that_is_read_is_not_replaced(
    command: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.root / "out"
    write_folder(
        run / "export", FOLDERS.get(command, MERGED), lambda path: shutil.copytree(place.model, path, dirs_exist_ok=True)
    )
    arguments = WHOLE[command](place, run / "export")
    models = [index for index, argument in enumerate(arguments) if argument in (str(place.root / "missing"), str(place.model))]
    arguments[models[0]] = str(run)
    refused(place, [*arguments, *(["--pool-prompt"] if "engine" in command else [])], capsys)


def test_a_run_does_not_replace_what_it_starts_from(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.root / "out"
    write_folder(run / "export", MERGED, lambda path: shutil.copytree(place.model, path, dirs_exist_ok=True))
    (run / "run.json").write_text('{"recipe": "grit", "starts": []}')
    refused(place, _training(place, run, "export.enabled=true", f"model.init_from={run}", "resume=auto"), capsys)


def test_outputs_of_ours_are_written_again(place: Place) -> None:
    for arguments in (
        ["encode", str(place.model), str(place.texts), "--out", str(place.root / "v.npy"), "--device", "cpu"],
        ["report", str(place.run)],
        ["plot", str(place.run)],
        ["data", "overlap", str(place.rows), str(place.texts), "--write", str(place.root / "clean.jsonl")],
    ):
        assert main(arguments) == 0
        assert main(arguments) == 0, "the second time over what the first has written"


def test_every_command_is_in_this_test() -> None:
    tested = {name.partition(",")[0] for name in (*WHOLE, *INSIDE)}
    assert commands().keys() - READERS - tested == {"demo"}, "demo trains with a run_dir of its own, as train does"


def folder_of(kind: FolderKind, target: Path) -> Path:
    """An output of a kind, as far as the record tells."""
    write_folder(target, kind, lambda building: (building / kind.mark).write_text("days of work"))
    return target


def try_to_replace(target: Path, kind: FolderKind, *, allowed: bool) -> None:
    """A command of this kind replaces the folder, or leaves it as it is."""
    before = tree(target)
    with nullcontext() if allowed else pytest.raises(OutputError, match="holds other outputs of unified_lm"):
        write_folder(target, kind, lambda building: (building / kind.mark).write_text("new"))
    assert (tree(target) != before) == allowed


def test_a_folder_is_replaced_by_its_own_kind_only(tmp_path: Path) -> None:
    """Every kind over every kind; over one of an earlier version, which tells by its files alone; with a file of its own."""
    kinds = set(FOLDERS.values())
    assert len({kind.name for kind in kinds}) == len(kinds)
    for there in kinds:
        for kind in kinds:
            target = tmp_path / there.name / kind.name
            try_to_replace(folder_of(there, target), kind, allowed=there is kind)
            earlier = folder_of(there, tmp_path / "earlier" / there.name / kind.name)
            forget_kinds(earlier)
            try_to_replace(earlier, kind, allowed=there.mark == kind.mark)
        target = folder_of(there, tmp_path / "lone" / there.name)
        write_text_file(target / "v.npy", "an output of its own")
        try_to_replace(target, there, allowed=False)


@pytest.mark.parametrize("command", [*FOLDERS, *EMPTY_PLACES])
def test_a_command_replaces_no_output_of_another(command: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    target = place.root / "out" / NAMES.get(command, "out")
    kind = FOLDERS.get(command)
    folder_of(next(other for other in FOLDERS.values() if other is not kind), target)
    if command == "train":
        (target.parent / "run.json").write_text('{"recipe": "grit", "starts": []}')
    assert "holds other outputs" in refused(place, WHOLE[command](place, target), capsys)
    shutil.rmtree(target)
    write_text_file(target / "v.npy", "an output of its own")
    assert "holds other outputs" in refused(place, WHOLE[command](place, target), capsys)
    if kind is not None and command != "train":  # which would train
        shutil.rmtree(target)
        main(WHOLE[command](place, folder_of(kind, target)))
        assert "other outputs" not in capsys.readouterr().err


def test_vectors_beside_which_a_copy_would_go_stay(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = place.root / "out"
    assert main(["encode", str(place.model), str(place.texts), "--out", str(out / "v.npy"), "--device", "cpu"]) == 0
    capsys.readouterr()
    message = refused(place, ["standardize", str(place.model), "--corpus", str(place.texts), "--out", str(out)], capsys)
    assert "holds other outputs of unified_lm: v.npy (file)" in message
