"""The code of docs/python-api.md runs as it stands, and looking at a run changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_run import metrics
from unified_lm.cli.script import train
from unified_lm.export.manifest import Manifest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """What the page's code leaves behind, run block after block in an empty folder."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(BLOCKS, start=1):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), found)
    return found


def test_the_page_ends_where_it_says(names: dict[str, Any], folder: Path) -> None:
    assert len(BLOCKS) == 5
    assert names["finished"] is True
    assert set(names["losses"].by_stream) == {"embedding", "generation"}
    assert names["losses"].total > 0
    assert names["vectors"].shape[0] == 2
    assert str(names["folder"]) == "runs/looked-at/export"
    assert (folder / "runs" / "first" / "export" / "modules.json").is_file()
    assert str(names["session"].run_dir) == "runs/chain/2-llm2vec_simcse"
    stages = Manifest.load(folder / "runs" / "chain" / "2-llm2vec_simcse" / "export").stages
    assert [stage.recipe for stage in stages] == ["llm2vec_mntp", "llm2vec_simcse"]


def test_neither_looking_nor_the_way_of_starting_changes_a_step(names: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config = ["recipe=grit_smollm2", "model=tiny_random", "max_steps=2"]
    command = metrics(train([*config, f"run_dir={tmp_path}/command"]))
    assert len(command) == 4, "two steps between two validations"
    assert metrics(folder / "runs" / "first") == command
    assert metrics(folder / "runs" / "looked-at") == command
    assert metrics(train([*config, "seed=7", f"run_dir={tmp_path}/other"])) != command, "the comparison can fail"


def test_what_the_page_calls_is_what_the_package_offers() -> None:
    import unified_lm

    imported = set(re.findall(r"\w+", " ".join(re.findall(r"^from unified_lm import (.*)$", "".join(BLOCKS), re.MULTILINE))))
    assert imported == set(unified_lm.__all__) - {"__version__"}
    assert set(unified_lm.__all__) <= set(dir(unified_lm))
    assert all(hasattr(unified_lm, name) for name in unified_lm.__all__)
