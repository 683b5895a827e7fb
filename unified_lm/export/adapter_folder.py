"""An export of the adapter alone, which stock peft puts on the base that training started from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unified_lm.config.schema import LoraConfig
from unified_lm.core.errors import CheckpointError, ModelError
from unified_lm.core.files import write_text
from unified_lm.core.outputs import write_folder
from unified_lm.data.prompts.templates import Template
from unified_lm.export.directory import DTYPES, complete_manifest, prompts, write_tokenizer
from unified_lm.export.manifest import ADAPTER, Manifest
from unified_lm.export.merge import skeleton_of
from unified_lm.export.model_card import model_card
from unified_lm.export.sentence_transformers_files import write_projection
from unified_lm.models.adapters import attach_adapter
from unified_lm.models.lora import adapter_weights, peft_config
from unified_lm.models.pooling import Projection
from unified_lm.models.quiet import quiet_loading
from unified_lm.models.token_rows import token_row_layers
from unified_lm.models.weights_hash import hash_weights

WEIGHTS_FILE = "adapter_model.safetensors"
"""peft's name for the weights of an adapter."""


def write_adapter(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    config: LoraConfig,
    base: str,
    base_revision: str | None,
    manifest: Manifest,
    template: Template,
    projection: Projection | None = None,
) -> Manifest:
    """Write the folder of an adapter: peft's files, the tokenizer, the manifest and a model card.

    Args:
        causal_lm: with the adapters of `models.lora.apply_lora`.
        tokenizer: its tokenizer.
        target: the folder to create, or to replace where it is one of an adapter.
        config: of the adapters.
        base: directory or Hub name of the model that the adapter belongs to.
        base_revision: Hub revision of the base.
        manifest: what to record; completed as in `export_model`.
        template: the prompt template.
        projection: linear head on the pooled vector, or None.

    Returns:
        The manifest as written.

    Raises:
        OutputError: `target` holds what this package did not write, or is a file or a link.
        CheckpointError: rows of tokens were trained beside the adapters; peft would not put the adapter where it was trained
            (it takes the names of a mixture of experts' plain layers for those of its experts); the folder cannot be written.
    """
    if any(token_row_layers(causal_lm)):
        raise CheckpointError(
            "rows of the embedding table were trained beside the adapters (lora.trainable_tokens), which the folder of an "
            "adapter does not hold: nothing was written. Export it merged."
        )
    adapter, weights = peft_config(causal_lm, config, base, base_revision), adapter_weights(causal_lm)
    # A base without values shows whether peft finds every layer and every shape. peft changes the configuration.
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    try:
        attach_adapter(skeleton_of(causal_lm), peft_config(causal_lm, config, base, base_revision), empty, str(target))
    except ModelError as error:
        raise CheckpointError(
            f"stock peft cannot put this adapter on a model of family '{manifest.family}'; nothing was written. Export it "
            f"merged. ({error})"
        ) from error
    complete = complete_manifest(manifest, causal_lm, template, projection)
    written: list[Manifest] = []

    def fill(building: Path) -> None:
        """Write every file."""
        saved_tokenizer = write_tokenizer(tokenizer, template, complete, building)
        adapter.save_pretrained(str(building))
        save_file(weights, building / WEIGHTS_FILE, metadata={"format": "pt"})
        if projection is not None:
            write_projection(projection, DTYPES[complete.dtype], building)
        final = replace(complete, weights_hash=hash_weights(building))
        final.save(building)
        card = model_card(final, prompts(final, template, saved_tokenizer), False)
        write_text(building / "README.md", card.rstrip() + "\n\n" + _card_section(base, base_revision))
        written.append(final)

    with quiet_loading(reports=False):
        write_folder(target, ADAPTER, fill)
    return written[0]


def _card_section(base: str, revision: str | None) -> str:
    """The section of the model card about the base."""
    at = f', revision="{revision}"' if revision else ""
    return f"""## Adapter

This folder holds a LoRA adapter only. It belongs to exactly these weights: `{base}`{f" at `{revision}`" if revision else ""}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"{at}), "FOLDER")
```

unified_lm merges it on loading: `UnifiedLM.from_pretrained("FOLDER")`, `model.name=FOLDER`.
"""
