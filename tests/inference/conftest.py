"""Exports of tiny models with merged adapters, shared by the tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_lm.config.schema import LoraConfig
from unified_lm.data.prompts.templates import get_template
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest
from unified_lm.export.merge import merge_lora
from unified_lm.models.lora import apply_lora
from unified_lm.models.tiny import tiny_model, tiny_tokenizer


def make_export(
    folder: Path, family: str = "llama", add_bos: bool = True, changes: dict[str, Any] | None = None, **config: Any
) -> Path:
    """Train nothing, but adapt, merge and export a tiny model."""
    model = tiny_model(family, **config)
    apply_lora(model, LoraConfig(r=4, alpha=8.0, dropout=0.0), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    manifest = Manifest(
        recipe="tiny",
        base_model="tiny",
        family=family,
        template="grit",
        template_fields={},
        instructions={"query": "Find the passage."},
        max_tokens=96,
        dtype="float32",
    )
    template = get_template("grit")
    export_model(
        merge_lora(model),
        tiny_tokenizer(add_bos),
        folder,
        manifest=Manifest(**{**vars(manifest), **(changes or {})}),
        template=template,
        verify="off",
    )
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make an export once per session and set of arguments."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **options: Any) -> Path:
        key = f"{family}{sorted(options.items())}"
        if key not in made:
            made[key] = make_export(tmp_path_factory.mktemp("exports") / "export", family, **options)
        return made[key]

    return make
