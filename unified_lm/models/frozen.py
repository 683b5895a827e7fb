"""Weights that training leaves as they are (`optim.frozen`): MONET's routers, say, or the embedding table."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from unified_lm.core.errors import ModelError, did_you_mean


def freeze(causal_lm: PreTrainedModel, names: Sequence[str]) -> str:
    """Take parameters out of training, in place. Adapters in a frozen module stay zero.

    Args:
        causal_lm: the model. A parameter that two modules share (a tied output head) is frozen for both.
        names: of modules or parameters, or parts of their names: "router", "mlp.gate_proj", "embed_tokens.weight".

    Returns:
        What is frozen, one line.

    Raises:
        ModelError: a name matches nothing that has parameters, or nothing is left to train.
    """
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    frozen: set[str] = set()
    for name in names:
        own = {full for full in parameters if f".{name}." in f".{full}."}
        if not own:
            parts = list(dict.fromkeys(part for full in parameters for part in full.split(".") if not part.isdigit()))
            raise ModelError(
                f"optim.frozen: '{name}' matches no module and no parameter of this {causal_lm.config.model_type} model."
                f"{did_you_mean(name, parts)}"
            )
        frozen |= own
    kept = {id(parameters[full]): parameters[full] for full in frozen}
    every = {id(parameter): parameter for parameter in parameters.values()}
    if not any(parameter.requires_grad for key, parameter in every.items() if key not in kept):
        raise ModelError(f"optim.frozen: without {', '.join(names)} nothing is left to train.")
    for parameter in kept.values():
        parameter.requires_grad_(False)
    sizes = {key: int(getattr(p, "ds_numel", p.numel())) for key, p in every.items()}  # as ZeRO-3 remembers them
    share = sum(sizes[key] for key in kept) / sum(sizes.values())
    return f"{', '.join(names)}: {len(kept)} tensors ({share:.1%} of all parameters) stay as they are (optim.frozen)"
