"""Curves of runs: what is drawn, and a page that needs nothing but a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unified_lm.cli.main import main
from unified_lm.core.errors import DataError
from unified_lm.engine.metrics import read_metrics
from unified_lm.reporting.curves import build_panels, load_runs, plot_run, smoothed
from unified_lm.reporting.curves_page import thin, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "input", "link", "br", "img", "hr"}


def write_run(
    folder: Path, *, steps: int = 60, streams: tuple[str, ...] = ("embedding", "generation"), held_out: bool = True
) -> Path:
    """A run's metrics.jsonl, as `fit` writes it."""
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            losses = {f"loss/{name}": 3 / step + index for index, name in enumerate(streams)}
            lines.append(
                {"step": step, **losses, "loss": sum(losses.values()), "learning_rate": 1e-5 * step, "gradient_norm": 2.0}
                | {"tokens_per_second": 1000.0 + step, "mfu": 0.3, "memory_peak_gib": 4.0, "imbalance_compute": 1.0}
            )
        if held_out and step in (0, steps):
            values = {f"heldout/{name}": 2.0 + index for index, name in enumerate(streams)}
            lines.append({"step": step, **values, "retrieval/ndcg@10": 0.4, "retrieval_causal/ndcg@10": 0.2})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def panels_of(*folders: Path) -> dict[str, Any]:
    return {panel.title: panel for panel in build_panels(load_runs(folders))}


def test_panels_of_one_run(tmp_path: Path) -> None:
    panels = panels_of(write_run(tmp_path / "a"))
    assert list(panels) == [
        *("embedding loss", "generation loss", "total loss", "retrieval nDCG@10"),
        *("learning rate", "gradient norm", "speed", "MFU", "peak memory"),
    ]
    training, held_out = panels["embedding loss"].curves
    assert (training.kind, held_out.kind) == ("training", "held-out")
    assert training.steps == list(range(1, 61))
    assert held_out.steps == [0, 60]
    assert {curve.kind for curve in panels["retrieval nDCG@10"].curves} == {"bidirectional", "causal"}
    assert panels["MFU"].curves[0].values[0] == 30.0


@pytest.mark.parametrize("name", ["router_balance", "router_uniformity", "router_ambiguity", "router_active_keys"])
def test_what_routers_do_has_a_panel(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=3)
    changed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [line | ({f"generation/{name}": 2.1} if "loss" in line else {}) for line in changed]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (curve,) = panels_of(run)[f"generation {name}".replace("_", " ")].curves
    assert (curve.kind, curve.values) == ("training", [2.1, 2.1, 2.1])


def test_runs_of_different_recipes_share_what_they_have(tmp_path: Path) -> None:
    grit, mntp = write_run(tmp_path / "grit"), write_run(tmp_path / "mntp", streams=("mntp",), held_out=False)
    panels = panels_of(grit, mntp)
    assert [curve.run for curve in panels["mntp loss"].curves] == [1]
    assert [curve.run for curve in panels["total loss"].curves] == [0]  # of one objective it would be the same again
    assert [curve.run for curve in panels["speed"].curves] == [0, 1]


def test_a_chain_stands_for_its_stages_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    for chain in ("one", "two"):
        write_run(tmp_path / chain / "1-mntp", streams=("mntp",))
        write_run(tmp_path / chain / "2-simcse", streams=("simcse",))
    runs = load_runs([tmp_path / "one", tmp_path / "two"])
    assert [run.name for run in runs] == ["one/1-mntp", "one/2-simcse", "two/1-mntp", "two/2-simcse"]
    assert len(load_runs([tmp_path / "one", tmp_path / "one" / "1-mntp"])) == 2  # named twice, drawn once


def test_a_killed_run_is_read_up_to_its_torn_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", held_out=False)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    assert panels_of(run)["speed"].curves[0].steps[-1] == 59
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 60 is not JSON"):
        read_metrics(run)


def test_a_resumed_run_counts_the_later_value_and_infinity_is_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=3, held_out=False)
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 2, "loss/embedding": 9.0}\n{"step": 4, "loss/embedding": Infinity}\n')
        handle.write(f'{{"step": 5, "loss/embedding": {"9" * 400}}}\n')  # a whole number that no float holds
    curve = panels_of(run)["embedding loss"].curves[0]
    assert curve.steps == [1, 2, 3, 4, 5]
    assert curve.values[1] == 9.0
    assert all(map(math.isnan, curve.values[3:]))


def test_missing_runs_are_refused_with_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "grit-july")
    (tmp_path / "empty").mkdir()
    assert main(["plot", str(tmp_path / "grit-jule")]) == 2
    assert "no such run" in (told := capsys.readouterr().err)
    assert "Did you mean 'grit-july'?" in told
    assert main(["plot", str(tmp_path / "empty")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert main(["plot", str(tmp_path / "empty")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "curves.png"), str(run / "curves.html")]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run), str(write_run(tmp_path / "b", held_out=False)), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "curves.html").is_file()
    assert plot_run(run) == run / "curves.png"


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smoothed([5.0, 5.0, 5.0], 0.9) == pytest.approx([5.0, 5.0, 5.0])
    assert smoothed([1.0, math.nan, 3.0], 0.5)[2] == pytest.approx((0.5 * 0.5 * 1 + 0.5 * 3) / 0.75)
    assert smoothed([1.0, 2.0], 0.0) == [1.0, 2.0]


def test_long_curves_are_thinned_without_losing_a_spike() -> None:
    values = [0.0] * 50_000
    values[31_234] = 99.0
    steps, kept = thin(range(50_000), values, 2000)
    assert len(steps) <= 2000
    assert steps == sorted(steps)
    assert kept[steps.index(31_234)] == 99.0


# --- the page ----------------------------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Opens and closes every element, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = load_runs([write_run(tmp_path / "<!--<script>"), write_run(tmp_path / "plain", held_out=False)])
    return write_page(build_panels(runs), runs, tmp_path / "curves.html")


def test_the_page_is_well_formed_self_contained_and_holds_the_data(page: Path) -> None:
    text = page.read_text()
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert parser.addresses == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert "{{" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert data["runs"] == ["<!--<script>", "plain"]
    training = data["panels"][0]["curves"][0]
    assert training["steps"] == list(range(1, 61))
    assert training["values"][:2] == [3.0, 1.5]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_curves_and_answers_the_pointer(page: Path) -> None:
    """Counts what the script has drawn, then hovers, hides a run and switches to a logarithmic axis."""
    script = """<script>
    const result = [], chart = charts[0], count = name => chart.svg.querySelectorAll(name).length;
    addEventListener("error", event => result.push(event.message));
    (() => {
      redraw();
      result.push(charts.length, count("path"));
      const box = chart.svg.getBoundingClientRect();
      chart.svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
      const tip = chart.tip.getBoundingClientRect(), card = chart.box.getBoundingClientRect();
      const inWidth = card.left < tip.left && tip.right < innerWidth;
      result.push(chart.tip.textContent, inWidth && card.top < tip.top && tip.bottom < card.bottom);
      document.querySelectorAll("#legend button")[0].click();
      result.push(count("path"));
      const before = chart.svg.querySelector("path").getAttribute("d");
      chart.box.querySelector(".log").click();
      result.push(before !== chart.svg.querySelector("path").getAttribute("d"));
      theme.click();
      result.push(document.documentElement.dataset.theme);
      document.body.dataset.result = JSON.stringify(result);
    })();
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--dump-dom",
        page.as_uri(),
    ]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-result="([^"]*)"', dump)
    assert found, dump[-2000:]
    num_charts, paths, tip, is_inside, paths_of_one_run, changed, chosen = json.loads(
        found[1].replace("&quot;", '"').replace("&gt;", ">")
    )
    assert num_charts == 9
    assert paths == 5  # two runs, each raw and smoothed, and one held-out curve
    assert paths_of_one_run == 2
    assert re.match(r"step \d+", tip)
    assert "plain training" in tip
    assert is_inside
    assert changed
    assert chosen in ("dark", "light")
