"""A dense checkpoint as a sparse mixture of experts of a stock transformers family (Komatsuzaki et al. 2023, arXiv:2212.05055).

Attention, norms and embeddings are copied. Every expert is a copy of the layer's feed-forward network, or, fine-grained, one of
equal parts of it (its hidden channels, split; DeepSeekMoE, arXiv:2401.06066). The router is new and small, and the weights of
the chosen experts sum to one: so without noise and parts the mixture computes what its parent did. Experts that are all the
same have nothing to choose between, which training alone changes slowly. Two remedies:

- noise: normal, of so much of each matrix's standard deviation, another one for each expert;
- drop: a share of each expert's hidden channels is drawn anew, from a normal of the same mean and deviation as what it replaces
  (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261, best at one half, after long training: at first such a model has
  forgotten nearly everything, docs/moee.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unified_lm.config.checks import at_least
from unified_lm.core.errors import ConfigError, ModelError

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense family -> the mixture with the same attention, norms and feed-forward activation."""

_SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "attention_dropout"),
    *("tie_word_embeddings", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_MOST_EXPERTS = 4096
"""No published mixture of a stock family has more; the check spares who types a digit too many an allocation of that size."""
_EXPERT = re.compile(r"(?P<layer>.*mlp)\.(?P<part>gate|experts\.gate_up_proj|experts\.down_proj)(\.weight)?$")


@dataclass(frozen=True, kw_only=True)
class UpcycleSettings:
    """How experts are made.

    Attributes:
        experts: of each layer.
        top_k: experts per token.
        parts: into how many experts a feed-forward network is split; 1 copies it whole. With parts a mixture computes its
            parent's output in expectation only, since a token may choose one part twice and another not at all.
        noise: standard deviation of what is added to each expert, relative to that of the matrix.
        drop: share of each expert's hidden channels that is drawn anew, at least 0 and below 1.
        router_std: standard deviation of the routers' weights. That of their logits is so many times the length of a router's
            input, which differs between models: 3 to 5 in SmolLM2, whose probabilities are nearly even with the default
            (entropy 0.9986 of the greatest) and not with 0.2 (0.89).
        seed: for routers, noise and draws.
    """

    experts: int = 8
    top_k: int = 2
    parts: int = 1
    noise: float = 0.0
    drop: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    def problems(self) -> Iterator[str]:
        """What is wrong with it, one sentence each."""
        yield from at_least("experts", self.experts, 2)
        if self.experts > _MOST_EXPERTS:
            yield f"experts: got {self.experts}, expected at most {_MOST_EXPERTS}."
        yield from at_least("parts", self.parts, 1)
        yield from at_least("noise", self.noise, 0)
        yield from at_least("router_std", self.router_std, 0)
        if not 1 <= self.top_k <= self.experts:
            yield f"top_k: got {self.top_k}, expected 1 to {self.experts}, the number of experts."
        if self.parts >= 1 and self.experts % self.parts:
            yield f"experts: got {self.experts}, expected a multiple of parts ({self.parts}), so that none is missing."
        if not 0 <= self.drop < 1:
            yield f"drop: got {self.drop}, expected a share of at least 0 and below 1."


@torch.no_grad()
def upcycle(dense: PreTrainedModel, settings: UpcycleSettings) -> PreTrainedModel:
    """Make a mixture of experts of a dense model.

    Args:
        dense: on the CPU; not changed. Its weights keep their dtype.
        settings: how.

    Returns:
        The mixture, on the CPU, in evaluation mode; it shares no memory with `dense`.

    Raises:
        ConfigError: settings that make no sense.
        ModelError: there is no mixture of the same architecture.
    """
    if problems := list(settings.problems()):
        raise ConfigError(problems)
    config = _config(dense.config, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dense.dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            sparse = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    source = dense.state_dict()
    for name, parameter in sparse.named_parameters():
        found = _EXPERT.match(name)
        if found is None:
            value = source.get(name)
        elif found["part"] == "gate":
            value = settings.router_std * torch.randn(parameter.shape, generator=generator)
        else:
            network = {part: source[f"{found['layer']}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            value = _experts(network, found["part"].endswith("down_proj"), settings, name)
        if value is None or value.shape != parameter.shape:
            raise ModelError(
                f"the mixture '{config.model_type}' has {name} {tuple(parameter.shape)}, the dense model "
                f"{'nothing of that name' if value is None else tuple(value.shape)}: they are not of one architecture."
            )
        parameter.copy_(value)
    if dense.generation_config is not None:
        sparse.generation_config = dense.generation_config
    return sparse.eval()


def _config(dense: Any, settings: UpcycleSettings) -> Any:
    family = dense.model_type
    if family not in TARGETS:
        raise ModelError(f"family '{family}' cannot be upcycled: expected {', '.join(sorted(TARGETS))}.")
    if biased := [name for name in ("attention_bias", "mlp_bias") if getattr(dense, name, False)]:
        raise ModelError(f"this {family} has biases ({', '.join(biased)}), and '{TARGETS[family]}' has none.")
    if dense.intermediate_size % settings.parts:
        raise ConfigError(f"parts: got {settings.parts}, which does not divide the {dense.intermediate_size} hidden channels.")
    values = {name: getattr(dense, name) for name in _SHARED if hasattr(dense, name)}
    size = dense.intermediate_size // settings.parts
    values |= {"num_experts_per_tok": settings.top_k, "intermediate_size": size}
    if TARGETS[family] == "mixtral":
        return AutoConfig.for_model("mixtral", **values, num_local_experts=settings.experts)
    own = {"num_experts": settings.experts, "moe_intermediate_size": size, "norm_topk_prob": True, "decoder_sparse_step": 1}
    return AutoConfig.for_model(TARGETS[family], **values, **own)


def _experts(network: dict[str, torch.Tensor], down: bool, settings: UpcycleSettings, name: str) -> torch.Tensor:
    """The stacked matrices of a layer's experts: `[E, 2 I, D]`, gate over up, or `[E, D, I]`.

    Args:
        network: "gate" and "up" `[I', D]`, "down" `[D, I']` of the dense layer.
        down: which of the two.
        settings: how.
        name: of the parameter; both parameters of a layer draw the same channels.
    """
    layer = int("".join(re.findall(r"layers\.(\d+)\.", name)) or 0)
    stacked = []
    for expert in range(settings.experts):
        part = {key: _part(weight, key, expert % settings.parts, settings.parts) for key, weight in network.items()}
        # The channels are drawn first, so that they do not depend on which matrix is asked for.
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + layer) * 4099 + expert)
        size = part["gate"].shape[0]
        dropped = torch.randperm(size, generator=generator)[: round(settings.drop * size)]
        for key in ("down",) if down else ("gate", "up"):
            weight = part[key] = part[key].float().clone()
            if settings.noise:
                weight += settings.noise * weight.std() * torch.randn(weight.shape, generator=generator)
            if len(dropped):
                lost = weight[:, dropped] if key == "down" else weight[dropped]
                drawn = lost.mean() + lost.std() * torch.randn(lost.shape, generator=generator)
                weight.index_copy_(1 if key == "down" else 0, dropped, drawn)
        stacked.append(part["down"] if down else torch.cat([part["gate"], part["up"]]))
    return torch.stack(stacked)


def _part(weight: torch.Tensor, key: str, index: int, parts: int) -> torch.Tensor:
    """A part of a network's channels. Weights of the chosen experts sum to one, so each part counts for all of them."""
    part = weight.chunk(parts, dim=1 if key == "down" else 0)[index]
    return part * parts if key == "down" else part
