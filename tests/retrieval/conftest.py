"""A tiny exported model that reads and answers, for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.inference.conftest import make_export
from unified_lm.inference import UnifiedLM


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("rag") / "export")


@pytest.fixture(scope="session")
def model(export: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(export)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., UnifiedLM]:
    def make(**options: object) -> UnifiedLM:
        return UnifiedLM.from_pretrained(make_export(tmp_path_factory.mktemp("other") / "export", **options))  # type: ignore[arg-type]

    return make
