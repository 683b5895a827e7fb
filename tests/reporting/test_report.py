"""The report of a run: its numbers are those of the run's files, its intervals cover, and it needs nothing but a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unified_lm.cli.main import main
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.engine.validation_items import ItemScores, items_path, read_items, write_items
from unified_lm.evaluation.result_table import ResultTable, find_result_tables, read_result_table
from unified_lm.reporting import report_page
from unified_lm.reporting.curves import build_panels, load_runs
from unified_lm.reporting.report import RunReport, differences, read_report
from unified_lm.reporting.report_numbers import held_out_table, run_cost
from unified_lm.reporting.report_page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "input", "link", "br", "img", "hr"}
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20


def scores(mean: float, num: int = 40) -> list[float]:
    drawn = np.random.default_rng(3).uniform(-0.2, 0.2, num)
    return [float(value) for value in drawn - drawn.mean() + mean]


def write_run(folder: Path, *, held_out: bool = True, items: bool = True, record: bool = True, max_steps: int = 4) -> Path:
    """A run's folder as `train` leaves it, without weights."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(max_steps + 1):
        if step:
            values = {"loss/embedding": 3.25 / step, "loss": 3.25 / step, "learning_rate": 1e-5, "gradient_norm": 2.0}
            cost = {"tokens": 1000.0, "samples": 8.0, "step_seconds": 2.0, "tokens_per_second": 500.0, "mfu": 0.25 * (step % 2)}
            lines.append({"step": step, **values, **cost, "model_teraflops_per_second": 0.5, "memory_peak_gib": 4.0 + step})
        if held_out and step in (0, max_steps):
            after = step > 0
            found = {
                "heldout/embedding": ItemScores("batch", scores(1.0 if after else 2.0, 4), [3.0, 1.0, 1.0, 1.0]),
                "retrieval/ndcg@10": ItemScores("query", scores(0.75 if after else 0.5)),
                "retrieval_causal/ndcg@10": ItemScores("query", scores(0.41, 40) if after else scores(0.4, 40)[::-1]),
            }
            lines.append({"step": step, **{name: item.mean for name, item in found.items()}})
            if items:
                write_items(folder, step, found)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"recipe": "grit_smollm2", "description": "Made for <tests>.", "max_steps": max_steps, "seed": 7}
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    if record:
        data = {"stream": "embedding", "source": "pairs.jsonl", "rows": 8928, "rejected": {"no text": 17}, "truncated": 3}
        model = {"name": "tiny", "revision": "", "family": "llama", "fingerprint": "ab12", "parameters": 10, "notices": []}
        start = {"time": "2026-01-02T03:04:05Z", "backend": "ddp", "device_type": "cuda", "device": "GPU", "peak_source": "x"}
        start |= {"peak_teraflops_per_device": 1.0, "platform": "Linux", "cpus": 4, "versions": {"commit": "0123abc+changes"}}
        content = {
            "recipe": "grit_smollm2",
            "model": {**model, "trained_parameters": 10, "attention_kernel": "sdpa"},
            "data": [{**data, "fingerprint": "f00d"}],
            "starts": [{**start, "from_step": 0, "num_ranks": 2}, {**start, "from_step": 3, "num_ranks": 4}],
        }
        (folder / "run.json").write_text(json.dumps(content))
    return folder


class Reader(HTMLParser):
    """Opens and closes every element in order; keeps addresses and machine-readable numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.numbers: list[float] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.numbers += [float(value) for name, value in attrs if (tag, name) == ("data", "value") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_page(path: Path) -> tuple[str, Reader]:
    text, reader = path.read_text(), Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return text, reader


# --- numbers ---------------------------------------------------------------------------------------------------------------


def test_intervals_cover_the_numbers_and_the_change_is_paired(tmp_path: Path) -> None:
    table = held_out_table(write_run(tmp_path / "a"))
    assert table is not None
    loss, retrieval, causal = table.results
    assert (table.first_step, table.last_step, table.has_items) == (0, 4, True)
    assert retrieval.change is not None
    assert retrieval.change.interval is not None
    assert retrieval.after.interval is not None
    assert retrieval.after.interval.low < retrieval.after.value < retrieval.after.interval.high
    assert retrieval.change.value == pytest.approx(0.25)
    # every query gained the same, so the paired change has no spread although both numbers have
    assert retrieval.change.interval.high - retrieval.change.interval.low == pytest.approx(0, abs=1e-12)
    assert (retrieval.verdict, retrieval.num_items, retrieval.unit) == ("better", 40, "query")
    assert causal.verdict == "unclear"  # the items disagree
    assert causal.title == "retrieval nDCG@10, read causally"
    assert loss.lower_is_better
    assert loss.after.interval is None  # four batches are too few
    assert loss.verdict == ""


def test_a_loss_that_falls_is_better_and_batches_are_weighted(tmp_path: Path) -> None:
    run = tmp_path / "a"
    run.mkdir()
    weights = [float(1 + index % 3) for index in range(12)]
    lines = []
    for step, mean in ((0, 3.0), (9, 2.0)):
        items = ItemScores("batch", scores(mean, 12), weights)
        write_items(run, step, {"heldout/x": items})
        lines.append(json.dumps({"step": step, "heldout/x": items.mean}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = held_out_table(run)
    assert table is not None
    (result,) = table.results
    assert result.verdict == "better"
    assert result.after.value == pytest.approx(np.average(scores(2.0, 12), weights=weights))
    assert result.after.interval is not None
    assert result.after.interval.value == pytest.approx(result.after.value)


def test_what_an_objective_measures_besides_its_loss_has_a_direction_only_where_it_is_known(tmp_path: Path) -> None:
    run = tmp_path / "a"
    run.mkdir()
    lines = []
    for step, shift in ((0, 0.0), (5, 0.3)):
        names = ("heldout/kto/accuracy", "heldout/kto/log_ratio_desirable")
        items = {name: ItemScores("sample", scores(0.4 + shift, 20)) for name in names}
        write_items(run, step, items)
        lines.append(json.dumps({"step": step, **{name: item.mean for name, item in items.items()}}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = held_out_table(run)
    assert table is not None
    assert [(result.title, result.verdict) for result in table.results] == [
        ("kto accuracy", "better"),
        ("kto log ratio desirable", "changed"),
    ]
    panels = build_panels(load_runs([run]))
    assert [panel.title for panel in panels] == ["kto accuracy", "kto log ratio desirable"]  # no losses


def test_scores_of_another_run_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_items(run, 4, {"retrieval/ndcg@10": ItemScores("query", scores(0.9))})
    with pytest.raises(DataError, match=r"mean of retrieval/ndcg@10 is 0\.9, metrics\.jsonl says 0\.75"):
        held_out_table(run)
    path = items_path(run, 4)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(DataError, match=r"step-00000004\.json is not valid JSON"):
        held_out_table(run)
    path.write_text('{"step": 4, "metrics": {"x": {"unit": "query", "scores": [1.0], "weights": [1.0, 2.0]}}}')
    with pytest.raises(DataError, match="1 scores, 2 weights"):
        read_items(run, 4)
    for values, weights in (
        ("1.0, 2.0", "0.0, 0.0"),
        ("1.0, 2.0", "-1.0, 2.0"),
        ("1.0, 2.0", "1.0, Infinity"),
        ("1.0, 2.0", "1.0, NaN"),
        ("Infinity, -Infinity", "1.0, 1.0"),
        ("1e308, 1e308", "1.0, 1.0"),
        (f"1.0, {'9' * 400}", "1.0, 1.0"),
    ):
        path.write_text(f'{{"step": 4, "metrics": {{"x": {{"unit": "query", "scores": [{values}], "weights": [{weights}]}}}}}}')
        with pytest.raises(DataError, match=r"step-00000004\.json is damaged .*Remove it"):
            read_items(run, 4)
    for kept in ("NaN, 1.0", "Infinity, 1.0"):  # of a run that diverged
        path.write_text(f'{{"step": 4, "metrics": {{"x": {{"unit": "query", "scores": [{kept}], "weights": null}}}}}}')
        assert not np.isfinite(read_items(run, 4)["x"].mean)


def test_cost_adds_up_over_starts_with_different_ranks_and_thinned_steps(tmp_path: Path) -> None:
    report = read_report(write_run(tmp_path / "a"))
    cost = report.cost
    assert cost is not None
    assert (cost.num_steps, cost.seconds, cost.tokens, cost.tokens_per_second) == (4, 8.0, 4000.0, 500.0)
    assert cost.device_hours == pytest.approx((3 * 2 + 1 * 4) * 2.0 / 3600)  # steps 1 to 3 on 2 ranks, step 4 on 4
    assert cost.model_flops == pytest.approx(4e12)
    assert cost.mfu == pytest.approx(0.125)
    assert cost.memory_peak_gib == 8.0
    every_second = [{"step": step, "step_seconds": 2.0, "tokens": 100.0} for step in (2, 4)]
    thinned = run_cost([*every_second, every_second[1]], [])  # a step taken twice counts once
    assert thinned is not None
    assert (thinned.seconds, thinned.tokens, thinned.device_hours, thinned.mfu, thinned.model_flops) == (
        8.0,
        400.0,
        None,
        None,
        None,
    )
    assert run_cost([{"step": 0, "heldout/x": 1.0}], []) is None


def test_settings_that_differ_from_the_recipe() -> None:
    default = {"recipe": "r", "optim": {"rate": 1, "betas": [0.9, 0.999]}, "streams": {"a": {"n": 1}, "b": {"n": 2}}, "new": 3}
    value = {
        "recipe": "r",
        "run_dir": "x",
        "optim": {"rate": 2, "betas": [0.9, 0.95]},
        "streams": {"a": {"n": 1}, "c": {"n": 5}},
    }
    found = {change.key: (change.default, change.value) for change in differences(default, value)}
    assert found == {
        "optim.rate": ("1", "2"),
        "optim.betas": ("[0.9, 0.999]", "[0.9, 0.95]"),
        "streams.b": ('{"n": 2}', None),
        "streams.c": (None, '{"n": 5}'),
    }
    sources = differences({"sources": [{"path": None}]}, {"sources": [{"path": "x.jsonl"}]})
    assert [change.key for change in sources] == ["sources.0.path"]


# --- tables of evaluations ---------------------------------------------------------------------------------------------------


def test_a_table_is_written_and_read_back(tmp_path: Path) -> None:
    table = ResultTable(title="Probe", columns=("layer", "gap"), rows=[[1, 0.5], ["mean", float("nan")]], figure="p.png")
    path = table.save(tmp_path / "run" / "evaluation" / "probe.json")
    (path.parent / "p.png").write_bytes(PNG)
    assert json.loads(path.read_text()) == {
        "title": "Probe",
        "columns": ["layer", "gap"],
        "rows": [[1, 0.5], ["mean", None]],
        "figure": "p.png",
    }
    (found,) = find_result_tables(tmp_path / "run")
    assert found.rows == [[1, 0.5], ["mean", None]]
    assert found.picture == PNG


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds list"),
        ('{"title": "x", "rows": []}', "has no columns"),
        ('{"title": "x", "columns": ["a"], "rows": [[1, 2]]}', "row 1 does not have one cell"),
        ('{"title": "x", "columns": ["a"], "rows": [[{}]]}', "row 1 has a cell that is neither"),
        ('{"title": "x", "columns": ["a"], "rows": [], "figur": "p.png"}', "unknown key 'figur'. Did you mean 'figure'"),
        ('{"title": "x", "columns": ["a"], "rows": [["b \\ud800"]]}', "the text 'b \\ud800' holds"),
        ('{"title": "\\udc00", "columns": ["a"], "rows": []}', "half of a surrogate pair"),
        ('{"title": "x", "columns": ["a"], "rows": [], "figure": "p\\u0000.png"}', "holds a NUL character"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(told)):
        read_result_table(path)


def test_a_figure_must_be_a_png_beside_its_table(tmp_path: Path) -> None:
    table = ResultTable(title="t", columns=("a",), rows=[], figure="../p.png", folder=tmp_path)
    with pytest.raises(DataError, match="is not a file beside its table"):
        _ = table.picture
    (tmp_path / "p.png").write_text("<svg>")
    with pytest.raises(DataError, match="is not a PNG"):
        _ = ResultTable(title="t", columns=("a",), rows=[], figure="p.png", folder=tmp_path).picture


def test_results_of_mteb_are_read_in_their_own_layout(tmp_path: Path) -> None:
    folder = tmp_path / "mteb" / "results" / "unified_lm__a" / "f96e"
    folder.mkdir(parents=True)
    result = {"task_name": "STSBenchmark", "scores": {"test": [{"hf_subset": "default", "main_score": 0.3429}]}}
    (folder / "STSBenchmark.json").write_text(json.dumps(result))
    (folder / "model_meta.json").write_text("{}")
    (table,) = find_result_tables(tmp_path)
    assert table.title == "mteb: unified_lm/a"
    assert table.rows == [["STSBenchmark", "test", "default", 0.3429]]
    for name in ("half \ud800", ["a list"]):
        (folder / "STSBenchmark.json").write_text(json.dumps({**result, "task_name": name}))
        with pytest.raises(DataError, match=r"f96e holds a result that is none of mteb: .*Run the task again"):
            find_result_tables(tmp_path)
    (folder / "STSBenchmark.json").write_text("{}")
    with pytest.raises(DataError, match=r"STSBenchmark\.json is not an mteb result"):
        find_result_tables(tmp_path)


# --- the page --------------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_runs_numbers_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    table = ResultTable(title="Probe <b>", columns=("layer", "gap"), rows=[[1, 0.123456]], figure="p.png")
    table.save(run / "evaluation" / "probe.json")
    (run / "evaluation" / "p.png").write_bytes(PNG)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text, reader = read_page(run / "report.html")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (lines[0], lines[-1]):
        assert set(line.values()) - {0, 4} <= set(reader.numbers)
    assert {8.0, 4000.0, 0.123456} <= set(reader.numbers)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    loss = next(panel for panel in data["panels"] if panel["title"] == "embedding loss")
    assert loss["curves"][0]["values"] == [float(f"{line['loss']:.6g}") for line in lines if "loss" in line]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.addresses)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    for words in (
        "Made for &lt;tests&gt;.",
        "Probe &lt;b&gt;",
        "17 × no text",
        "8,928",
        "f00d",
        "0123abc+changes",
        "GPU hours",
    ):
        assert words in text
    assert "<code>seed</code></td><td><code>42</code></td><td><code>7</code>" in text


def test_an_old_run_without_validation_record_or_export_still_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", held_out=False, record=False)
    text, _ = read_page(write_report(run, tmp_path / "out" / "page.html"))
    assert "Held-out results" not in text
    assert "measured nothing on held-out data" in text
    assert "No run.json" in text
    assert "not recorded" in text  # device hours


def test_a_run_that_kept_no_items_says_that_it_has_no_intervals(tmp_path: Path) -> None:
    text, _ = read_page(write_report(write_run(tmp_path / "a", items=False)))
    assert "its numbers have no confidence interval" in text
    assert 'class="verdict' not in text
    assert "not kept" in text


def test_a_run_that_has_only_begun_and_one_that_measured_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", held_out=False)
    (run / "metrics.jsonl").write_text('{"step": 0, "retrieval/ndcg@10": 0.25}\n{"step": 1, "lo')
    text, reader = read_page(write_report(run))
    assert 0.25 in reader.numbers
    assert "before" not in text.partition("Held-out results")[2].partition("</table>")[0]
    (run / "metrics.jsonl").write_text("")
    text, _ = read_page(write_report(run))
    assert "No step was measured." in text


def test_a_chain_has_a_section_for_each_stage(tmp_path: Path) -> None:
    for name in ("1-mntp", "2-simcse"):
        write_run(tmp_path / "chain" / name)
    text, reader = read_page(write_report(tmp_path / "chain"))
    assert reader.addresses == ["#run-1", "#run-2"]
    assert text.count('class="stage"') == 2
    assert text.count('id="panels"') == 1


def test_a_broken_part_of_a_chain_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [write_run(tmp_path / "chain" / name) for name in ("1-mntp", "2-simcse")]

    def read(folder: Path) -> RunReport:
        if folder == parts[1]:
            raise DataError("its numbers cannot be read.")
        return read_report(folder)

    monkeypatch.setattr(report_page, "read_report", read)
    with pytest.raises(DataError, match=rf"^{re.escape(str(parts[1]))}: its numbers cannot be read\.$"):
        write_report(tmp_path / "chain")
    monkeypatch.undo()
    (parts[1] / "run.json").write_text("5")
    with pytest.raises(DataError, match=rf"^{re.escape(str(parts[1]))}/run\.json: got 5"):
        write_report(tmp_path / "chain")


def test_an_unknown_recipe_shows_every_setting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "config.yaml").write_text("recipe: mine\nmax_steps: 4\n")
    text, _ = read_page(write_report(run))
    assert "unknown recipe &#39;mine&#39;" in text
    assert "<details open>" in text


def test_missing_and_torn_files_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    assert main(["report", str(tmp_path / "b")]) == 2
    assert "no such run" in capsys.readouterr().err
    (run / "run.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"run\.json is not valid JSON"):
        read_report(run)
    (run / "run.json").write_text('{"model": {}, "data": []}')
    with pytest.raises(DataError, match=r"run\.json: missing field 'starts' "):
        read_report(run)
    (run / "run.json").unlink()
    (run / "config.yaml").write_text("recipe: [")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_report(run)
    (run / "config.yaml").write_text('recipe: x\ndescription: "half \\ud800"\n')
    with pytest.raises(DataError, match=r"config\.yaml: the setting 'description' holds .*half of a surrogate"):
        read_report(run)
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"has no config\.yaml"):
        read_report(run)


READERS = {
    "report": lambda run, other, out: ["report", str(run), "--out", str(out / "page.html")],
    "compare": lambda run, other, out: ["compare", str(run), str(other), "--out", str(out)],
    "plot": lambda run, other, out: ["plot", str(run), str(other), "--out", str(out)],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.jsonl", "[1]", r", line 7: got \[1\] \(list\), expected an object"),
        ("metrics.jsonl", "5", r", line 7: got 5 \(int\), expected an object"),
        ("metrics.jsonl", '{"step": "four"}', r", line 7: step: got 'four' \(str\), expected a whole number"),
        ("metrics.jsonl", '{"step": true}', r", line 7: step: got True \(bool\), expected a whole number"),
        ("metrics.jsonl", '{"loss": 1.0}', r", line 7: step: got None \(null\), expected a whole number"),
        ("metrics.jsonl", '{"step": 4, "loss": "x"}', r", line 7: loss: got 'x' \(str\), expected a number"),
        ("metrics.jsonl", '{"step": 4, "loss": [1]}', r", line 7: loss: got \[1\] \(list\), expected a number"),
        ("metrics.jsonl", '{"step": -4, "loss": 1.0}', ", line 7: step: got -4, expected 0 or more"),
        ("metrics.jsonl", '{"step": 0, "step_seconds": 1.0}', ", line 7: step: got 0, expected 1 or more"),
        *(
            (
                "metrics.jsonl",
                f'{{"step": 4, "{name}": {value}}}',
                rf", line 7: {name}: got .*, expected .* from {least} to 1e\+18",
            )
            for name, value, least in (
                *(("step_seconds", value, "1e-09") for value in ("NaN", "Infinity", "-1.0", "0.0", "1e300", "9" * 400)),
                *(("tokens", value, "0") for value in ("NaN", "Infinity", "-1", "9" * 400)),
                ("mfu", "NaN", "0"),
                ("model_teraflops_per_second", "Infinity", "0"),
            )
        ),
        (
            "metrics.jsonl",
            '{"step": 4, "heldout/\\ud800": 1.0}',
            r", line 7: the name 'heldout/\\ud800' holds .*",
        ),
        ("run.json", "[]", r": got \[\] \(list\), expected an object"),
        ("run.json", '{"starts": 5}', r": starts: got 5 \(int\), expected a list"),
        ("run.json", '{"starts": [5]}', r": starts\.0: got 5 \(int\), expected an object"),
        ("run.json", '{"model": 5}', r": model: got 5 \(int\), expected an object"),
    ],
)
def test_mistyped_files_are_refused_by_name_where_they_are_read(
    reader: str, name: str, content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    path = run / name
    if name == "metrics.jsonl":
        path.write_text(f'{path.read_text()}{content}\n{{"step": 5, "loss": 1.0}}\n')
    else:
        new = json.loads(content)
        path.write_text(json.dumps({**json.loads(path.read_text()), **new} if isinstance(new, dict) else new))
    code = main(READERS[reader](run, other, tmp_path / "out"))
    if name == "run.json" and reader != "report":  # the others read no run.json
        assert code == 0
        return
    said = capsys.readouterr().err
    assert code == 2
    assert re.search(re.escape(str(path)) + told, said), said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page_without_overflow(tmp_path: Path) -> None:
    """In frames: a headless window is never narrower than 500 pixels."""
    assert CHROMIUM is not None
    page = html.escape(write_report(write_run(tmp_path / "a"), tmp_path / "page.html").read_text())
    frames = "".join(
        f'<iframe srcdoc="{page}" style="width:{width}px;height:900px;border:0"></iframe>' for width in (1280, 400)
    )
    script = """<script>
    addEventListener("load", () => {
      document.body.dataset.result = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
        const root = frame.contentDocument.documentElement;
        frame.contentWindow.eval("redraw()");
        const numCurves = root.querySelectorAll(".plot path").length;
        return [frame.contentWindow.innerWidth, root.scrollWidth - root.clientWidth, numCurves];
      }));
      document.querySelectorAll("iframe").forEach(frame => frame.remove());
    });
    </script>"""
    frame = tmp_path / "frame.html"
    frame.write_text(f"<!doctype html><body>{script}{frames}</body>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--window-size=1400,1000"]
    command = [CHROMIUM, *options, "--dump-dom", frame.as_uri()]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-result="([^"]*)"', dump)
    assert found, dump[-2000:]
    measured = json.loads(found[1].replace("&quot;", '"'))
    assert sorted(width for width, *_ in measured) == [400, 1280]
    for _, overflow, num_curves in measured:
        assert overflow == 0
        assert num_curves > 3
