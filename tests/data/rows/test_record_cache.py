"""Resuming seeks: a saved place deep in an epoch is reached without drawing what came before it."""

from __future__ import annotations

import time

import numpy as np

from tests.engine.small_run import small_run
from unified_lm.composition.compose import compose_run
from unified_lm.core.random import derive_seed
from unified_lm.data.cursor import Cursor
from unified_lm.data.loader import StepLoader
from unified_lm.data.streams import TableStream, build_streams
from unified_lm.models.loading import load_model


def test_a_resumed_loader_draws_nothing_twice(tmp_path, monkeypatch):
    config = compose_run(small_run(tmp_path, tmp_path / "run"))
    tokenizer = load_model(config.model).tokenizer

    def loader() -> StepLoader:
        return StepLoader(build_streams(config, tokenizer), token_budget=1024)

    first = loader()
    for _ in range(200):  # several epochs
        first.next_batch()
    state = first.state_dict()
    resumed = loader()
    drawn = []
    draw = TableStream.draw
    monkeypatch.setattr(TableStream, "draw", lambda self, count=None: drawn.append(self.name) or draw(self, count))
    resumed.load_state_dict(state)
    assert drawn == []
    for expected, found in zip(first.next_batch().packs, resumed.next_batch().packs, strict=True):
        assert expected.input_ids.tolist() == found.input_ids.tolist()


def test_seeking_costs_one_shuffle_wherever_the_cursor_stands():
    num_rows = 200_000

    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng(derive_seed(3, epoch)).permutation(num_rows)

    def seek(epoch: int, position: int) -> tuple[float, Cursor]:
        cursor = Cursor(num_rows, order)
        started = time.perf_counter()
        cursor.load_state_dict({"epoch": epoch, "position": position, "deferred": []})
        return time.perf_counter() - started, cursor

    near = min(seek(0, 1)[0] for _ in range(5))
    far = min(seek(40, num_rows - 1)[0] for _ in range(5))
    assert far < 5 * near + 0.005, "the same work at the start of the first epoch and at the end of the 41st"
    walked = Cursor(num_rows, order)
    walked.take(2 * num_rows + 7)
    assert seek(2, 7)[1].take(5) == walked.take(5)
