"""Ranks whose settings or files differ do not train together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.small_run import small_run
from tests.processes import Group
from unified_lm.assembly import build_run, same_inputs
from unified_lm.assembly.same_inputs import require_same, setting_facts
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.composition.flat import flatten
from unified_lm.config.continuation import Change, change_of
from unified_lm.config.schema import RunConfig, SourceConfig, StreamConfig
from unified_lm.core import distributed
from unified_lm.core.errors import CheckpointError, DataError
from unified_lm.data.formats import FORMATS
from unified_lm.models.identity import held_weights_key
from unified_lm.models.tiny import tiny_model, tiny_tokenizer


def on_its_own_node(folder: str, rank: int) -> None:
    os.chdir(Path(folder) / f"node{rank}")


def write_nodes(tmp_path: Path, stale: str) -> list[str]:
    """A folder of rows for each rank, of which rank 1's lacks the last row; returns the run's arguments."""
    small_run(tmp_path, tmp_path / "run")
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        for name in ("pairs", "chats"):
            lines = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
            kept = lines[:-1] if (rank, name) == (1, stale) else lines
            (tmp_path / f"node{rank}" / f"{name}.jsonl").write_text("".join(kept))
    arguments = [a for a in small_run(tmp_path, tmp_path / "run", "max_steps=1") if "sources" not in a]
    sources = {"embedding": "pairs", "generation": "chats"}
    arguments += [f"streams.{stream}.sources=[{{path: {name}.jsonl}}]" for stream, name in sources.items()]
    return [*arguments, "~validation.sources.embedding", "validation.sources.generation=[{path: chats.jsonl}]"]


@pytest.mark.parametrize("stale", ["pairs", "nothing"])
def test_a_stale_copy_on_one_node_ends_the_run_before_its_first_step(tmp_path: Path, stale: str) -> None:
    arguments = write_nodes(tmp_path, stale)
    group = Group(arguments, 2, tmp_path / "log", prepare=partial(on_its_own_node, str(tmp_path)))
    codes = group.wait()
    if stale == "nothing":
        assert codes == [0, 0], group.output()
        return
    assert codes == [2, 2], group.output()
    assert "streams.embedding: pairs.jsonl: rank 0 has 60 rows" in group.output()
    assert "rank 1 has 59 rows" in group.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("fact", ["optim.learning_rate", "weights", "validation.sources.generation: chats.jsonl"])
def test_every_fact_is_compared(monkeypatch: pytest.MonkeyPatch, fact: str) -> None:
    ours = {fact: "a", "seed": "42"}
    for others in ([ours, {**ours, fact: "b"}, ours], [ours, {"seed": "42"}, ours]):
        monkeypatch.setattr(distributed, "all_gather_objects", lambda value, others=others: json.loads(json.dumps(others)))
        with pytest.raises(DataError, match=f"{fact}: ranks 0, 2 have a; rank 1 has (b|nothing)") as refusal:
            require_same(ours)
        assert "seed" not in str(refusal.value)


def held_sources(cls: type, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key of the schema that holds sources of rows; `*` is any one name."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield from _held(hints[field.name], (*path, field.name))


def _held(hint: Any, path: tuple[str, ...]) -> Iterator[str]:
    named = ("*",) if getattr(hint, "__origin__", None) is dict else ()
    for kind in get_args(hint):
        yield from _held(kind, (*path, *named))
    if hint is SourceConfig:
        yield ".".join(path)
    elif hint is StreamConfig:
        yield from {key for format_config in FORMATS.values() for key in held_sources(format_config, path)}
    elif is_dataclass(hint) and isinstance(hint, type):
        yield from held_sources(hint, path)


PLACES = sorted(set(held_sources(RunConfig)))


def ranks_differ(monkeypatch: pytest.MonkeyPatch, first: list[str], second: list[str]) -> str:
    """Build a run as rank 0 does and then as rank 1 does, which is told what rank 0 had; returns the refusal."""
    seen: list[Any] = []

    def gather(value: Any) -> list[Any]:
        seen.append(value)
        return [value]

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "all_gather_objects", gather)
        patch.setattr(same_inputs, "weights_key", lambda loaded: held_weights_key(loaded.causal_lm))  # as with several ranks
        build_run(compose_run(first))
        of_rank0 = iter(list(seen))
        patch.setattr(distributed, "all_gather_objects", lambda value: [next(of_rank0), value])
        with pytest.raises(DataError) as refusal:
            build_run(compose_run([*second, f"run_dir={Path(compose_run(second).run_dir)}-1"]))
    return str(refusal.value)


def differing(refusal: str) -> list[str]:
    """The facts that a refusal lists."""
    return [line.strip().split(": rank")[0] for line in refusal.splitlines()[1:-1]]


def test_the_schema_holds_sources() -> None:
    assert {"streams.*.sources", "validation.sources.*", "validation.retrieval.queries"} <= set(PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_every_place_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    base = [a for a in small_run(tmp_path, tmp_path / "run") if not a.startswith("~")]
    (tmp_path / "stale").mkdir()
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    lines[7] = lines[7].replace("is 7?", "was 7?")
    (tmp_path / "stale" / "pairs.jsonl").write_text("".join(lines))
    held_out = [
        f"validation.sources={{embedding: [{{path: {tmp_path}/pairs.jsonl}}]}}",
        f"validation.retrieval={{queries: {{path: {tmp_path}/pairs.jsonl}}}}",
    ]
    one, key = f"{{path: {tmp_path}/stale/pairs.jsonl}}", place.replace("*", "embedding")
    stale = f"{key}={one}" if key.endswith("queries") else f"{key}=[{one}]"
    found = differing(ranks_differ(monkeypatch, [*base, *held_out], [*base, *held_out, stale]))
    assert found
    assert all(fact.startswith(key.removesuffix(".sources")) for fact in found)


def write_base(folder: Path, seed: int, *, swapped: bool = False) -> str:
    """A model on disk; `swapped` gives two letters each other's number."""
    tiny_model("llama", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    letters = tokenizer["model"]["vocab"]
    if swapped:
        letters["X"], letters["Y"] = letters["Y"], letters["X"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return f"model.name={folder}"


def test_weights_tokenizer_and_projection_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [a for a in small_run(tmp_path, tmp_path / "run") if a != "model=tiny_random"]
    arguments += ["model.source=hub", "model.family=llama", "model.dtype=float32", "model.projection_dim=8"]
    fresh = write_base(tmp_path / "fresh", 0)
    for what, base in {
        "tokenizer": write_base(tmp_path / "letters", 0, swapped=True),
        "weights": write_base(tmp_path / "weights", 1),
    }.items():
        named = f"run_dir={tmp_path}/{what}-run"
        found = differing(ranks_differ(monkeypatch, [*arguments, fresh, named], [*arguments, base, named]))
        assert found[0] == what
        assert found == [what] or what == "tokenizer"  # which decides the tokens of every stream, too
    for name, seed in (("a", 1), ("b", 2)):
        train([*arguments, fresh, "export.enabled=true", "max_steps=1", f"seed={seed}", f"run_dir={tmp_path}/{name}"])
    starts = [[*arguments, f"model.init_from={tmp_path}/{name}", f"run_dir={tmp_path}/next"] for name in ("a", "b")]
    assert differing(ranks_differ(monkeypatch, *starts)) == ["weights", "projection"]


def edit_configuration(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"]["rope_theta"] *= 50
    values["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(values))


def edit_one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


STALE_MODELS = {
    edit_configuration: [f"configuration of the model: {key}" for key in ("rms_norm_eps", "rope_parameters.rope_theta")],
    edit_one_weight: ["weights"],
}


@pytest.mark.parametrize("edit", STALE_MODELS)
def test_stale_files_of_a_model_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Path], None]) -> None:
    """With adapters: nothing would bring frozen weights of ranks together."""
    arguments = [a for a in small_run(tmp_path, tmp_path / "run", "lora=all_linear") if a != "model=tiny_random"]
    arguments += ["model.source=hub", "model.family=llama", "model.dtype=float32"]
    fresh, stale = write_base(tmp_path / "fresh", 0), write_base(tmp_path / "stale", 0)
    edit(tmp_path / "stale")
    found = differing(ranks_differ(monkeypatch, [*arguments, fresh], [*arguments, stale]))
    assert sorted(set(found) - {"weights"}) == STALE_MODELS[edit] or found == STALE_MODELS[edit]


def test_a_resume_of_a_model_whose_configuration_changed_is_refused(tmp_path: Path) -> None:
    arguments = [a for a in small_run(tmp_path, tmp_path / "run", "max_steps=1") if a != "model=tiny_random"]
    arguments += ["model.source=hub", "model.family=llama", "model.dtype=float32", write_base(tmp_path / "base", 0)]
    train(arguments)
    edit_configuration(tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"configuration of the model, rope_parameters.rope_theta: the checkpoint has 10000"
    ):
        build_run(compose_run([*arguments, "resume=auto"]))


def test_every_setting_is_compared_but_for_where_things_lie_and_what_rank_0_does_alone(tmp_path: Path) -> None:
    config = compose_run([a for a in small_run(tmp_path, tmp_path / "run") if not a.startswith("~")])
    own = set(flatten(config)) - set(setting_facts(config))
    assert {key for key in own if change_of(key) is Change.REFUSED} == set()
    assert own == {
        *("model.name", "model.init_from", "model.tokenizer", "run_dir", "description", "notices", "checkpoint.copy_to"),
        *("streams.embedding.sources", "streams.generation.sources", "logging.progress", "logging.wandb"),
        *("validation.sources.embedding", "validation.sources.generation"),
        *(key for key in flatten(config) if key.startswith(("validation.retrieval.queries.", "logging.wandb_"))),
    }


@pytest.mark.parametrize("change", ["validation.every=7", "checkpoint.every=3", "packing.token_budget=512", "logging.every=2"])
def test_ranks_that_would_meet_at_other_steps_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    arguments = small_run(tmp_path, tmp_path / "run")
    assert differing(ranks_differ(monkeypatch, arguments, [*arguments, change])) == [change.partition("=")[0]]
