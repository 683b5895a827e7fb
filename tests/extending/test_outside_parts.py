"""Parts from outside the package, one file each: training, dry run, memory estimate, export; and parts that cannot work."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from rich.console import Console

from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.objectives import ObjectiveConfig
from unified_lm.config.parts import find_description
from unified_lm.config.streams import StreamConfig
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats import FORMATS
from unified_lm.engine.accounting.dry_run import print_dry_run
from unified_lm.engine.accounting.estimate import estimate
from unified_lm.export.manifest import Manifest
from unified_lm.objectives import OBJECTIVES

MARGIN = "tests.extending.margin_loss"
FORMS = "tests.extending.titled_pairs"
SMALL = ["recipe=grit_smollm2", "model=tiny_random", "max_steps=2", "logging.progress=false", "validation.num_batches=1"]
PACKAGE = Path(__file__).resolve().parents[2] / "unified_lm"


def objective(text: str) -> str:
    return f"streams.embedding.objective={{name: {MARGIN}.{text}}}"


def steps(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "gradient_norm" in line]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe with an objective and two formats of one's own; in several packs, so that GradCache is used."""
    settings = [
        objective("MultipleNegativesMargin, margin: 0.3, exponent: 2.0"),
        f"streams.embedding.format={FORMS}.SwappedPairs",
        "+streams.embedding.swap_probability=1.0",
        f"streams.generation.format={FORMS}.MyChat",
        "packing.token_budget=300",
    ]
    return [*SMALL, *settings]


def test_they_train_and_export_with_their_modes(outside, tmp_path):
    run_dir = train([*outside, f"run_dir={tmp_path}/run"])
    found = steps(run_dir)
    assert len(found) == 2
    assert all(line["loss/embedding"] > 0 and "embedding/violations" in line for line in found)
    assert all(line["decorrelation"] > 0 for line in found), "the coupled term that the objective names"
    assert Manifest.load(run_dir / "export").modes == ("embed", "generate")


def test_their_parameters_are_read(outside, tmp_path):
    changed = [argument.replace("margin: 0.3", "margin: 0.9") for argument in outside]
    losses = [
        steps(train([*arguments, "export.enabled=false", f"run_dir={tmp_path}/{index}"]))[0]["loss/embedding"]
        for index, arguments in enumerate((outside, changed))
    ]
    assert losses[1] > losses[0]


def test_dry_run_and_estimate_know_them(outside):
    config = compose_run(outside)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115 - rich writes to it
    print_dry_run(config, console)
    text = console.export_text()
    assert "margin: 0.3" in text
    assert "swap_probability: 1.0" in text
    assert estimate(config).bytes_by_part["embeddings"] > 0


@pytest.mark.parametrize(
    ("arguments", "modes"),
    [
        ([f"streams.embedding.format={FORMS}.MyPairs"], ("embed", "generate")),
        ([f"streams.generation.format={FORMS}.MyChat", "~streams.embedding", "~validation.retrieval"], ("generate",)),
    ],
)
def test_a_subclass_exports_what_its_base_does(arguments, modes, tmp_path):
    drop = ["~validation.sources.embedding"] if "~streams.embedding" in arguments else []
    run_dir = train([*SMALL, *arguments, *drop, f"run_dir={tmp_path}/run"])
    assert Manifest.load(run_dir / "export").modes == modes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([objective("Wordless")], "its class attribute `Config` must be a subclass of"),
        ([objective("Missing")], "cannot import the objective"),
        (
            [objective("MultipleNegativesMargin, marign: 0.2")],
            r"unknown key .*marign.*Did you mean .*margin'",
        ),
        ([objective("MultipleNegativesMargin, margin: -1")], "objective.margin: got -1.0, expected more than 0"),
        ([objective("MultipleNegativesMargin, temperature: 0.5")], "temperature: does not apply to the objective"),
        ([objective("MultipleNegativesMargin, beta: 0.1")], "beta: does not apply to the objective"),
        ([objective("Thawed")], "description ThawedConfig is incomplete: it is no dataclass, so margin"),
        ([objective("Kindless")], "description KindlessConfig is incomplete: it does not say kind"),
        ([objective("Baseless")], "kind is <ObjectiveKind.TOKEN: 'token'>, so it must be a subclass of TokenObjectiveConfig"),
        ([objective("Numberless")], "AttributeError: 'Numberless' object has no attribute 'metrics'"),
        (
            ["streams.embedding.objective={name: tests.extending.raises_on_import.Loss}"],
            "cannot import .*: no luck",
        ),
        ([f"streams.embedding.format={FORMS}.Limitless"], "LimitlessStream is incomplete: limit_keys is"),
        (
            [objective("Contradictory")],
            r"Contradictory failed when it was tried .*ValueError: not enough",
        ),
        (
            [f"streams.embedding.format={FORMS}.Unpooled"],
            "PairsStream.objective_kind is EMBEDDING, so every sample",
        ),
        (["streams.embedding.format=collections.OrderedDict"], "'collections.OrderedDict' is no format that can be used"),
        (["streams.embedding.format=pair"], "unknown format 'pair'. Did you mean 'pairs'"),
    ],
)
def test_a_part_that_cannot_work_says_so_before_training(arguments, message, tmp_path):
    start = (
        [*SMALL, "~streams.embedding.objective", *[f"+{a}" for a in arguments]]
        if "objective=" in arguments[0]
        else [*SMALL, *arguments]
    )
    with pytest.raises(ConfigError, match=message):
        train([*start, f"run_dir={tmp_path}/run"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_export_that_lacks_a_trained_mode_is_announced_in_capitals():
    config = compose_run([*SMALL, "export.modes=[embed]"])
    assert any("THE EXPORT WILL NOT GENERATE, WHICH STREAM generation TRAINS" in notice for notice in config.notices)


@pytest.mark.parametrize(("table", "base"), [(FORMATS, StreamConfig), (OBJECTIVES, ObjectiveConfig)])
def test_every_built_in_is_described_by_its_implementation(table, base):
    """The dotted path of an implementation gives the same description as its name."""
    for name, description in table.items():
        assert find_description(description.implementation, table, base) is description, name


OWN_WORDS = {"text", "chat", "pairs", "preference", "grounded"}
"""Names of formats that are also names of columns, records, roles or parts of data sets: there a literal may mean those."""


def test_no_name_of_a_format_or_objective_is_a_literal_elsewhere():
    """Nothing compares names: whoever needs to know a part asks its description."""
    allowed = {PACKAGE / "data" / "formats", PACKAGE / "objectives"}
    names = {*FORMATS, *OBJECTIVES}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if any(folder in path.parents for folder in allowed):
            continue
        tree = ast.parse(path.read_text())
        compared = {
            id(c) for node in ast.walk(tree) if isinstance(node, ast.Compare) and _asks_a_part(node) for c in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in names and (node.value not in OWN_WORDS or id(node) in compared):
                found.append(f"{path.relative_to(PACKAGE)} {node.value!r}")
    assert found == ["evaluation/words/features.py 'next_token'"], "an alignment of word-level probes, no objective"


def _asks_a_part(node: ast.Compare) -> bool:
    """Whether a comparison reads `.format` of anything, or the name of an objective."""
    return any(
        isinstance(part, ast.Attribute)
        and (part.attr == "format" or (part.attr == "name" and "objective" in ast.unparse(part.value)))
        for part in ast.walk(node)
    )
