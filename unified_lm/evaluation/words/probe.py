"""Linear probes on frozen vectors: what a word's state says about its tag without any further computation."""

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
    """Learns tags from vectors and predicts those of others."""

    def predict(
        self, train: np.ndarray, labels: np.ndarray, sentences: np.ndarray, test: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Fit and predict.

        Args:
            train: float32 `[N, D]`.
            labels: int64 `[N]`, classes 0 to C - 1, all of which occur; C is at least 2.
            sentences: int64 `[N]`, the sentence of each row, ascending from 0.
            test: float32 `[M, D]`.

        Returns:
            int64 `[M]`, and what to note about the fit.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Name and settings, for results."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogisticProbe:
    """Multinomial logistic regression on standardized dimensions, by scikit-learn's L-BFGS.

    The problem is convex, so its solution depends on no seed, no order and no learning rate. Standardizing is linear too: it
    only keeps the penalty from being about the few dimensions that are large in language models.

    Attributes:
        inverse_penalty: scikit-learn's C (> 0) on the *sum* of the losses, as there.
        max_iterations: of L-BFGS; the result says when they ran out.
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
        scale = np.where(deviation > 0, deviation, 1.0)
        prepared = [((side - mean) / scale).astype(np.float32) for side in (train, test)]
        model = LogisticRegression(C=self.inverse_penalty, max_iter=self.max_iterations, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said in the result instead
            model.fit(prepared[0], labels)
        iterations = int(np.max(model.n_iter_))
        return model.predict(prepared[1]), {"iterations": iterations, "converged": iterations < self.max_iterations}

    def describe(self) -> dict[str, Any]:
        """See `Probe.describe`."""
        return {"name": "logistic", "inverse_penalty": self.inverse_penalty, "max_iterations": self.max_iterations}


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear layer behind dropout, trained as LLM2Vec trains its word-level heads.

    From their configs: AdamW, batches of 8 sentences, learning rate 5e-4 falling linearly without warm-up, dropout 0.1,
    gradients cut to norm 1, vectors as they are.

    Departures: dropout is off in testing (theirs is left on), weights and optimizer are float32 (theirs bfloat16), and the
    learning rate falls to 0 at the last step (theirs is cut off at step 4,000 of a schedule over 10 epochs, and step 3,000 is
    tested).

    Attributes:
        seed: of initial weights, order and dropout.
        num_steps: optimizer steps.
        learning_rate: at the first step.
        batch_sentences: sentences per step.
        dropout: share of dimensions set to zero in training, in [0, 1).
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
        starts = np.searchsorted(sentences, np.arange(int(sentences[-1]) + 2))
        rng = np.random.default_rng(self.seed)
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
            if len(order) < self.batch_sentences:
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
    """The probe of that name with its default settings.

    Args:
        name: one of `PROBES`.
        seed: for those that need one.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROBES:
        raise ConfigError(f"unknown probe '{name}'.{did_you_mean(name, PROBES)}")
    return LogisticProbe() if name == "logistic" else LinearProbe(seed=seed)


def fit_tags(
    probe: Probe, train: np.ndarray, tags: Sequence[Sequence[str]], test: np.ndarray
) -> tuple[list[str], dict[str, Any]]:
    """Train a probe on the tags of sentences, and tag other words.

    Args:
        probe: which.
        train: float32 `[N, D]`, words of all training sentences in order.
        tags: per training sentence its tags, N together.
        test: float32 `[M, D]`.

    Returns:
        M tags, and what to note about the fit.

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
