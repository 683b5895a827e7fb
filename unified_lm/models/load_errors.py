"""Errors of fetching and reading model files, turned into errors that a user can act on."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unified_lm.core.errors import ModelError, UserError
from unified_lm.models.headless import empty_head, head_names


@contextmanager
def explain(location: str, part: str, is_hub: bool) -> Iterator[None]:
    """Turn errors of transformers and huggingface_hub into a `ModelError`.

    Args:
        location: the Hub name or directory that is read.
        part: "configuration", "weights" or "tokenizer".
        is_hub: whether `location` is a Hub name.

    Raises:
        ModelError: loading failed for a reason that the user can fix.
    """
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the weights of '{location}' are a pickle file that holds more than tensors: reading it could run code. "
            "Convert them to safetensors on a machine that trusts their source."
        ) from error
    except Exception as error:  # a damaged file can make the libraries raise anything, bare Exception included
        if type(error).__module__.startswith("safetensors"):
            raise ModelError(f"the weights of '{location}' are torn ({_first_line(error)}). Fetch them again.") from error
        raise ModelError(_text(error, location, part, is_hub)) from error


def tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, after it split a word: with values of another type in its configuration it loads, and fails in use.

    Raises:
        Exception: whatever it raises; call this where errors of loading are turned into messages.
    """
    tokenizer("a")
    return tokenizer


def check_special_tokens(causal_lm: PreTrainedModel) -> None:
    """Check the token ids of the model's generation config: transformers takes any value, and fails when it generates.

    Raises:
        ValueError: names the entry and its value; call this where errors of loading are turned into messages.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(getattr(causal_lm, "generation_config", None), name, None)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or abs(token) >= 1 << 63:  # negative: "none", in old configurations
                where = "generation_config.json or config.json"
                raise ValueError(f"{where}: {name} is {value!r:.60}, expected a token id (an integer)")


_OLD_BUFFER = re.compile(r"(.*\.(?:attn|attention|self_attn|self_attention))\.(?:bias|masked_bias|causal_mask|embed_positions)")
"""Tensors of an attention module that are computed, not learned, and that older versions of transformers wrote into checkpoints
(GPT-J, CodeGen): the causal mask, the value of what it hides, and the table of positions."""


def _is_old_buffer(key: str, modules: set[str]) -> bool:
    """Whether an unexpected tensor is an old buffer of an attention module that the model has, so that nothing is lost."""
    match = _OLD_BUFFER.fullmatch(key)
    return match is not None and match[1] in modules


def check_complete(info: dict[str, Any], name: str, causal_lm: PreTrainedModel, *, needs_head: bool = True) -> None:
    """Check that checkpoint and model have the same weights; transformers only warns about differences.

    Args:
        info: what transformers reports of loading.
        name: of the checkpoint, for the message.
        causal_lm: as loaded. Where it is allowed, a missing head becomes an empty one (`models.headless`).
        needs_head: False if the model will only embed.

    Raises:
        ModelError: weights are missing, unexpected or of another shape; the text counts them and names some.
    """
    modules = {name for name, _ in causal_lm.named_modules()}
    unexpected = [key for key in info.get("unexpected_keys") or () if not _is_old_buffer(str(key), modules)]
    info = {**info, "unexpected_keys": unexpected}
    missing, head = set(map(str, info.get("missing_keys") or ())), head_names(causal_lm)
    if not needs_head and missing and missing == head:
        empty_head(causal_lm)
        info["missing_keys"] = ()
    problems = []
    for key, meaning in (
        ("missing_keys", "missing from the checkpoint (they would be random)"),
        ("unexpected_keys", "in the checkpoint but not in the model (they would be lost)"),
        ("mismatched_keys", "of another shape"),
    ):
        if names := sorted(map(str, info.get(key) or ())):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{len(names)} weights are {meaning}: {shown}")
    if problems:
        hint = (
            " It has no language-model head, which token losses and generation need: take the causal language model, not its "
            "bare decoder. (A run whose streams all compare embeddings needs none.)"
        )
        raise ModelError(
            f"'{name}' does not fill a {type(causal_lm).__name__} exactly. "
            + "; ".join(problems)
            + "."
            + (hint if missing & head else "")
        )


def _text(error: Exception, location: str, part: str, is_hub: bool) -> str:
    # The chain, because transformers raises OSError from the Hub's own, more specific errors.
    chain = _chain(error)
    message = str(error)
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in message:
        return (
            f"'{location}' is gated: ask for access on https://huggingface.co/{location}, then run `hf auth login` or set "
            "HF_TOKEN."
        )
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return f"'{location}' has no such revision. Set model.revision to a branch, tag or commit that exists, or to null."
    if any(isinstance(e, RepositoryNotFoundError) for e in chain) or "not a valid model identifier" in message:
        return (
            f"the Hub has no model '{location}' (or it is private, and you are not logged in), and there is no such directory. "
            "Check model.name; for a private one run `hf auth login` or set HF_TOKEN."
        )
    if "trust_remote_code" in message:
        return (
            f"'{location}' needs modeling code that comes with it. Read that code, then set model.trust_remote_code=true, "
            "or choose a family that transformers has itself."
        )
    if any(isinstance(e, LocalEntryNotFoundError | HfHubHTTPError) for e in chain) or "couldn't connect" in message:
        return _unreachable(location, part)
    if not is_hub and ("model_type" in message or "no file named" in message):
        missing = "config.json with a model_type" if part == "configuration" else "model.safetensors (or pytorch_model.bin)"
        return f"the directory '{location}' is not a model: it holds no {missing}."
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"cannot load the {part} of '{location}': {kind}{_first_line(error)}"


def _unreachable(location: str, part: str) -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            f"the {part} of '{location}' is not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or download the model "
            f"first (`hf download {location}`), or give a local directory."
        )
    return (
        f"the Hub cannot be reached for the {part} of '{location}', and it is not in the local cache. Check the network, give "
        "a local directory as model.name, or use the embedded model (model=smollm2_135m)."
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and everything that caused it."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
