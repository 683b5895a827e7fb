"""From the command line to files: every analysis on a tiny model, arms in one figure, resuming, errors."""

import json
from pathlib import Path

import pytest

from tests.inference.conftest import make_export
from unified_lm.cli.analyze import analyze
from unified_lm.cli.main import main
from unified_lm.core.errors import CheckpointError, ConfigError, OutputError, UserError
from unified_lm.evaluation.analyses import GROUPS
from unified_lm.evaluation.analyses.arms import Arm, ArmSettings, parse_arms
from unified_lm.evaluation.result_table import find_result_tables

PNG = b"\x89PNG"


def _arguments(files: dict[str, Path], out: Path) -> list[str]:
    small = ["--num-texts", "30", "--num-windows", "4", "--positions", "12", "--num-pairs", "20", "--device", "cpu"]
    where = ["--texts", str(files["texts"]), "--sts", str(files["sts"]), "--retrieval", str(files["pairs"])]
    return [
        *where,
        "--corpus",
        f"same={files['texts']}",
        "--corpus",
        str(files["sts"].parent / "texts.txt"),
        *small,
        "--out",
        str(out),
    ]


@pytest.fixture(scope="module")
def out(folder: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis")
    analyze(["all", f"uni={folder}@causal", f"bi={folder}", *_arguments(files, out)])
    return out


@pytest.mark.parametrize("name", GROUPS["all"])
def test_every_analysis_writes_numbers_and_a_figure(out: Path, name: str) -> None:
    result = json.loads((out / f"{name}.json").read_text())
    assert result["analysis"] == name
    assert list(result["arms"]) == ["uni", "bi"]
    assert result["measured_on"]
    assert (out / f"{name}.png").read_bytes().startswith(PNG)


def test_an_error_says_of_which_model(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    broken = make_export(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^second: "):
        analyze(["norms", f"first={folder}", f"second={broken}", *_arguments(files, tmp_path / "out")])


@pytest.mark.parametrize("name", ["layers", "norms"])
def test_too_few_positions_or_windows_are_refused(folder: Path, files: dict[str, Path], tmp_path: Path, name: str) -> None:
    arguments = [name, f"bi={folder}", *_arguments(files, tmp_path)]
    with pytest.raises(ConfigError, match=r"--positions 2: .*give at least 3"):
        analyze([*arguments, "--positions", "2"])
    with pytest.raises(ConfigError, match=r"--num-windows 1: .*at least 2"):
        analyze([*arguments, "--num-windows", "1"])
    assert not (tmp_path / f"{name}.json").exists()
    analyze([*arguments, "--positions", "3", "--num-windows", "2"])
    assert "NaN" not in (tmp_path / f"{name}.json").read_text()


@pytest.mark.parametrize("names", [["anisotropy", "future"], pytest.param(GROUPS["all"], marks=pytest.mark.slow)], ids=len)
def test_the_report_of_a_run_finds_every_analysis(
    names: list[str], folder: Path, files: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    make_export(run / "export")
    for name in names if len(names) < len(GROUPS["all"]) else ["all"]:
        analyze([name, f"base={folder}", f"trained={run}", f"causal={run / 'export'}@causal", *_arguments(files, tmp_path)])
    tables = find_result_tables(run)
    assert len(tables) == len(names)
    for name, table in zip(names, tables, strict=True):
        assert {row[0] for row in table.rows} == {"base", "trained", "causal"}
        assert table.note
        assert table.picture == (tmp_path / f"{name}.png").read_bytes()
    numbers = json.loads((tmp_path / "future.json").read_text())["arms"]["trained"]["bidirectional"]
    (row,) = [row for row in tables[1].rows if row[:2] == ["trained", "bidirectional"]]
    assert row[2:7] == [numbers[key] for key in ("similar", "different", "gap", "gap_low", "gap_high")]
    assert not (folder.parent / "evaluation").exists(), "a model that is no export has no report"


@pytest.mark.parametrize("ending", ["json", "png"])
@pytest.mark.parametrize("place", ["{out}/norms", "{run}/evaluation/analysis-norms"])
def test_every_place_of_its_files_is_checked_before_the_work(
    place: str, ending: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    make_export(run / "export")
    taken = Path(f"{place.format(run=run, out=out)}.{ending}")
    taken.parent.mkdir()
    taken.write_text("mine")
    monkeypatch.setattr(Arm, "load", lambda self: pytest.fail("the work began"))
    with pytest.raises(OutputError, match=rf"{taken.name} exists, and unified_lm did not write it.*nothing was changed"):
        analyze(["norms", f"trained={run}", *_arguments(files, out)])
    assert [path.name for path in taken.parent.iterdir()] == [taken.name]


def test_arms_have_their_own_attention(out: Path) -> None:
    arms = json.loads((out / "anisotropy.json").read_text())["arms"]
    assert [arm["attention"] for arm in arms.values()] == ["causal", "bidirectional"]
    assert arms["uni"]["mean_cosine"] != arms["bi"]["mean_cosine"]
    assert arms["uni"]["dimensions"] == 64


def test_standardize_measures_every_corpus(out: Path) -> None:
    arm = json.loads((out / "standardize.json").read_text())["arms"]["bi"]
    assert list(arm["spearman"]) == ["none", "same", "texts", "the evaluated texts"]
    assert arm["spearman"]["same"] == arm["spearman"]["texts"], "one corpus under two names"
    assert arm["spearman"]["same"]["value"] != arm["spearman"]["none"]["value"]
    change = arm["ndcg@10"]["same"]["value"] - arm["ndcg@10"]["none"]["value"]
    assert arm["ndcg@10"]["same"]["change"] == pytest.approx(change, abs=1e-5)


def test_what_is_measured_is_not_measured_again(
    out: Path, folder: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "norms.json").read_text()
    analyze(["norms", f"bi={folder}", f"again={folder}@bidirectional", f"uni={folder}@causal", *_arguments(files, out)])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2].strip() == "measured before" for line in lines] == [True, False, True]
    arms = json.loads((out / "norms.json").read_text())["arms"]
    assert list(arms) == ["bi", "again", "uni"]
    assert arms["uni"] == json.loads(before)["arms"]["uni"]
    assert arms["again"]["norm"] == arms["bi"]["norm"]
    analyze(["norms", f"bi={folder}", *_arguments(files, out), "--positions", "13"])
    assert "measured before" not in capsys.readouterr().err, "other material is measured anew"


def test_arms(folder: Path, tmp_path: Path) -> None:
    settings = ArmSettings()
    (first, second) = parse_arms([f"a+b={folder}@causal", str(folder)], settings)
    assert (first.label, first.settings.attention, first.folder) == ("a+b", "causal", folder)
    assert (second.label, second.settings.attention) == ("base", None)
    assert first.key() != second.key()
    assert parse_arms([f"{folder}@causal"], settings)[0].label == "base causal"
    with pytest.raises(ConfigError, match="two models are called 'base'"):
        parse_arms([str(folder), str(folder)], settings)
    with pytest.raises(ConfigError, match=r"unknown attention 'casual'.* 'causal'"):
        parse_arms([f"{folder}@casual"], settings)
    with pytest.raises(CheckpointError, match="there is no folder"):
        parse_arms([str(tmp_path / "missing")], settings)


def test_mistakes(folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"unknown analysis 'layer'\. Did you mean 'layers'"):
        analyze(["layer", str(folder)])
    with pytest.raises(ConfigError, match="needs something to score"):
        analyze(["standardize", str(folder), "--retrieval", "none", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="two corpora are called 'texts'"):
        analyze(["norms", str(folder), "--corpus", str(files["texts"]), "--corpus", "texts=pydocs"])
    (tmp_path / "norms.json").write_text('{"arms": [1]}')
    assert main(["analyze", "norms", str(folder), *_arguments(files, tmp_path)]) == 2
    assert "unified_lm did not write it" in capsys.readouterr().err
