"""What the terminal shows while a run trains."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from unified_lm.config.schema import LoggingConfig
from unified_lm.engine.metrics import Reporter, read_metrics


def test_the_bar_shows_every_objective_speed_and_time_left(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    with Reporter(LoggingConfig(every=2), tmp_path, 10, {}, console) as reporter:
        reporter.start_at(2)
        reporter.step(3, {"loss/embedding": 1.0})
        reporter.step(4, {"loss/embedding": 1.25, "loss/generation": 3.5, "loss": 4.75, "tokens_per_second": 12345.6})
        reporter.say("a line above the bar")
    text = shown.getvalue()
    for expected in ("embedding 1.250 generation 3.500", "12,346 tokens/s (no padding)", "4/10", "eta", "a line above"):
        assert expected in text
    assert [line["step"] for line in read_metrics(tmp_path)] == [4]  # every second step is written


def test_quiet_logging_draws_no_bar(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    with Reporter(LoggingConfig(progress=False), tmp_path, 10, {}, console) as reporter:
        reporter.step(1, {"loss/embedding": 1.25})
    assert "embedding" not in shown.getvalue()
