"""Whatever stands in the index of a checkpoint: it is torn, of another run, or read with the types that it was written with."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.checkpoint.test_state import IDENTITY
from tests.properties.cases import MANY, Case, require_text, run_cases
from tests.properties.places import damage, damages, originals
from unified_lm.checkpoint.state import STATE, load_state, open_tensors, saved_settings, torn
from unified_lm.core.errors import CheckpointError

_CHECKPOINT = "checkpoints/step-00000001"
CASES = st.fixed_dictionaries({"damage": st.deferred(lambda: damages(_CHECKPOINT, (STATE,)))})


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step-00000001")
        shutil.copytree(originals() / _CHECKPOINT, path)
        damage(path, *case["damage"])
        try:
            state = load_state(path, IDENTITY)
        except CheckpointError as error:
            require_text(error, naming=(str(path),))
            return
        assert torn(path) is None
        assert all(type(value) is int for value in (state.step, state.skipped, state.metrics_bytes, state.num_ranks))
        assert isinstance(state.loader, dict)
        assert isinstance(saved_settings(path) or {}, dict)
        with open_tensors(path) as read:
            assert all(isinstance(name, str) for name in read.names)


def test_an_index_is_read_or_refused() -> None:
    run_cases(CASES, check, 60)


@pytest.mark.slow
def test_many_indexes_are_read_or_refused() -> None:
    run_cases(CASES, check, MANY)
