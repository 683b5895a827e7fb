"""Sparse autoencoders over states of a layer, trained by SAELens: what MONET's experts are compared with.

Top-k autoencoders (Gao et al. 2024, arXiv:2406.04093). SAELens is an optional dependency; its release 6.54 needs
transformer-lens below 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from unified_lm.core.errors import ConfigError, DataError
from unified_lm.evaluation.experts.features import layer_outputs
from unified_lm.evaluation.generation.perplexity import Domain
from unified_lm.inference.unified import UnifiedLM

_BATCH = 512


@dataclass(frozen=True)
class AutoencoderSettings:
    """How autoencoders are trained.

    Attributes:
        latents: of each.
        active: latents that a state may use.
        passes: over the states.
        learning_rate: of Adam.
        seed: of initial weights and of the order of the states.
    """

    latents: int = 4096
    active: int = 32
    passes: int = 10
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Autoencoder:
    """A trained one.

    Attributes:
        encode: states `[N, D]` -> latents `[N, F]`, not negative.
        explained: share of the variance of its training states that it gives back.
        dead: share of latents that none of them uses.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    explained: float
    dead: float


def train_autoencoders(
    model: UnifiedLM,
    domain: Domain,
    layers: Sequence[int],
    *,
    context: int,
    settings: AutoencoderSettings | None = None,
) -> dict[int, Autoencoder]:
    """Train one for each layer on the states of some texts, which must fit into memory.

    Args:
        model: any decoder, read causally.
        domain: the texts.
        layers: whose outputs.
        context: tokens of a window.
        settings: of the training.

    Raises:
        ConfigError: sae-lens is not installed.
        ModelError: a layer that does not exist.
        DataError: fewer states than a batch.
    """
    settings = settings or AutoencoderSettings()
    require_saelens()
    states_NGD = torch.cat([states.cpu() for states, _ in layer_outputs(model, domain, context, layers)])
    if len(states_NGD) < _BATCH:
        raise DataError(f"{len(states_NGD)} tokens to train an autoencoder on; {_BATCH} is one batch. Give more texts.")
    return {layer: _train(states_NGD[:, group].contiguous(), settings, model.device) for group, layer in enumerate(layers)}


def require_saelens() -> None:
    """Raise ConfigError if SAELens cannot be imported."""
    try:
        import sae_lens  # noqa: F401 - takes seconds
    except ImportError as error:
        raise ConfigError(f"sparse autoencoders need SAELens ({error}): pip install sae-lens 'transformer-lens<3.9'") from error


def _train(states_ND: torch.Tensor, settings: AutoencoderSettings, device: torch.device | str) -> Autoencoder:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    # States of unit mean square, so that one learning rate suits any layer; latents keep their order under a scale.
    mean_D = states_ND.mean(0)
    scale = (states_ND - mean_D).square().mean().sqrt()
    states_ND = ((states_ND - mean_D) / scale).to(device)
    mean_D, scale = mean_D.to(device), scale.to(device)
    width = states_ND.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=settings.latents, k=settings.active, device=str(device)))
        steps = max(1, settings.passes * len(states_ND) // _BATCH)
        config = SAETrainerConfig(
            total_training_samples=steps * _BATCH,
            train_batch_size_samples=_BATCH,
            device=str(device),
            lr=settings.learning_rate,
            lr_end=settings.learning_rate / 10,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            logger=LoggingConfig(log_to_wandb=False),
        )
        SAETrainer(cfg=config, sae=sae, data_provider=_batches(states_ND, settings.seed)).fit()
    sae.eval()

    @torch.no_grad()
    def encode(states: torch.Tensor) -> torch.Tensor:
        """`[N, F]`."""
        found: torch.Tensor = sae.encode((states - mean_D) / scale)
        return found.clamp_min(0)

    with torch.no_grad():
        error, used = 0.0, torch.zeros(settings.latents, dtype=torch.bool, device=device)
        for part in states_ND.split(4096):
            latents = sae.encode(part)
            error += float((sae.decode(latents) - part).square().sum())
            used |= (latents > 0).any(0)
    return Autoencoder(encode, 1 - error / float(states_ND.square().sum()), 1 - float(used.float().mean()))


def _batches(states_ND: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(states_ND), generator=generator).split(_BATCH):
            if len(rows) == _BATCH:
                yield states_ND[rows.to(states_ND.device)]
