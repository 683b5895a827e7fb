"""Linear probes on frozen vectors: how much of a word's tag is linearly decodable from its state."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from unified_lm.core.errors import ConfigError, did_you_mean


class Probe(Protocol):
    """A classifier that is trained on the vectors of some words and predicts the tags of others."""

    def predict(
        self, train: np.ndarray, labels: np.ndarray, sentences: np.ndarray, test: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Train and predict.

        Args:
            train: float32 `[N, D]`.
            labels: int64 `[N]`, classes 0 to C - 1; every class occurs, and C is at least 2.
            sentences: int64 `[N]`, the sentence index of each row, ascending from 0.
            test: float32 `[M, D]`.

        Returns:
            Predicted classes int64 `[M]`, and notes on the fit.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Name and settings, recorded in results."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogisticProbe:
    """Multinomial logistic regression on standardized dimensions, by scikit-learn's L-BFGS.

    The problem is convex, so its solution does not depend on a seed, an order or a learning rate. Standardizing keeps the probe
    linear; it only prevents the penalty from being dominated by the few dimensions that are large in language models.

    Attributes:
        inverse_penalty: scikit-learn's C (> 0), which weights the *sum* of the losses.
        max_iterations: maximum iterations of L-BFGS; the result records whether they sufficed.
    """

    inverse_penalty: float = 0.1
    max_iterations: int = 300

    def predict(
        self, train: np.ndarray, labels: np.ndarray, sentences: np.ndarray, test: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """See `Probe.predict`."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        mean = train.mean(axis=0, dtype=np.float64)
        deviation = train.std(axis=0, dtype=np.float64)
        scale = np.where(deviation > 0, deviation, 1.0)  # a constant dimension stays 0 instead of becoming NaN
        prepared = [((side - mean) / scale).astype(np.float32) for side in (train, test)]
        model = LogisticRegression(C=self.inverse_penalty, max_iter=self.max_iterations, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result records it instead
            model.fit(prepared[0], labels)
        iterations = int(np.max(model.n_iter_))
        return model.predict(prepared[1]), {"iterations": iterations, "converged": iterations < self.max_iterations}

    def describe(self) -> dict[str, Any]:
        """See `Probe.describe`."""
        return {"name": "logistic", "inverse_penalty": self.inverse_penalty, "max_iterations": self.max_iterations}


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear layer after dropout, trained as LLM2Vec trains its word-level heads.

    From their configs: AdamW, batches of 8 sentences, learning rate 5e-4 with linear decay and no warm-up, dropout 0.1,
    gradients clipped to norm 1, vectors without standardization.

    Departures: dropout is off in testing (theirs stays on), weights and optimizer are float32 (theirs bfloat16), and the
    learning rate decays to 0 at the last step (theirs stops at step 4,000 of a schedule over 10 epochs, and step 3,000 is
    tested).

    Attributes:
        seed: seed of initial weights, order and dropout.
        num_steps: number of optimizer steps.
        learning_rate: learning rate at the first step.
        batch_sentences: sentences per step.
        dropout: probability of setting a dimension to zero in training, in [0, 1).
    """

    seed: int = 0
    num_steps: int = 4000
    learning_rate: float = 5e-4
    batch_sentences: int = 8
    dropout: float = 0.1

    def predict(
        self, train: np.ndarray, labels: np.ndarray, sentences: np.ndarray, test: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """See `Probe.predict`."""
        # Rows of a sentence are adjacent, so its first row and the first row of the next sentence delimit it.
        starts = np.searchsorted(sentences, np.arange(int(sentences[-1]) + 2))
        rng = np.random.default_rng(self.seed)
        # A fork, so that fitting a probe does not change the random numbers of whoever calls it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            head = nn.Linear(train.shape[1], int(labels.max()) + 1)
            loss = self._fit(head, train, labels, starts, rng)
        with torch.no_grad():
            logits = head(torch.from_numpy(np.ascontiguousarray(test)))
        return logits.argmax(dim=-1).numpy(), {"last_loss": loss}

    def _fit(
        self, head: nn.Linear, train: np.ndarray, labels: np.ndarray, starts: np.ndarray, rng: np.random.Generator
    ) -> float:
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.num_steps)
        order: list[int] = []
        loss = torch.zeros(())
        for _ in range(self.num_steps):
            if len(order) < self.batch_sentences:  # a batch may cross into the next epoch, as every batch has the same size
                order += rng.permutation(len(starts) - 1).tolist()
            batch, order = order[: self.batch_sentences], order[self.batch_sentences :]
            rows = np.concatenate([np.arange(starts[sentence], starts[sentence + 1]) for sentence in batch])
            inputs = F.dropout(torch.from_numpy(train[rows]), self.dropout)
            loss = F.cross_entropy(head(inputs), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return float(loss.detach())

    def describe(self) -> dict[str, Any]:
        """See `Probe.describe`."""
        return {"name": "linear", **{name: getattr(self, name) for name in self.__dataclass_fields__}}


PROBES = ("logistic", "linear")
"""Names of the probes on the command line."""


def make_probe(name: str, seed: int = 0) -> Probe:
    """Make the probe of that name with its default settings.

    Args:
        name: one of `PROBES`.
        seed: seed of a probe that needs one.

    Raises:
        ConfigError: there is no such probe.
    """
    if name not in PROBES:
        raise ConfigError(f"unknown probe '{name}'.{did_you_mean(name, PROBES)}")
    return LogisticProbe() if name == "logistic" else LinearProbe(seed=seed)


def fit_tags(
    probe: Probe, train: np.ndarray, tags: Sequence[Sequence[str]], test: np.ndarray
) -> tuple[list[str], dict[str, Any]]:
    """Train a probe on tagged sentences, and tag other words.

    Args:
        probe: the probe.
        train: float32 `[N, D]`, the words of all training sentences in order.
        tags: per training sentence, its tags; N in total.
        test: float32 `[M, D]`.

    Returns:
        M tags, and notes on the fit.

    Raises:
        ConfigError: all training words have the same tag.
    """
    flat = [tag for sentence in tags for tag in sentence]
    assert len(flat) == len(train), f"{len(flat)} tags for {len(train)} vectors"
    classes, labels = np.unique(np.asarray(flat), return_inverse=True)
    if len(classes) < 2:
        raise ConfigError(f"every training word has the tag '{classes[0]}': there is nothing to learn.")
    owners = np.repeat(np.arange(len(tags)), [len(sentence) for sentence in tags])
    predicted, notes = probe.predict(train, labels.astype(np.int64), owners, test)
    return classes[predicted].tolist(), notes
