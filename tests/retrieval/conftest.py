"""A tiny exported model that reads and answers, for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inference.conftest import make_export
from unified_lm.inference import UnifiedLM
from unified_lm.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("rag") / "export")


@pytest.fixture(scope="session")
def model(export: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(export)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., UnifiedLM]:
    def make(bare: bool = False, **options: Any) -> UnifiedLM:
        """A tiny export, or (`bare`) a tiny model as it is."""
        if bare:
            return UnifiedLM(tiny_model(**options), tiny_tokenizer(), template="grit", max_tokens=96)
        return UnifiedLM.from_pretrained(make_export(tmp_path_factory.mktemp("other") / "export", **options))

    return make
