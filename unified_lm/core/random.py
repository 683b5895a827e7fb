"""Random state: seeding, and capture and replay for GradCache and checkpoints.

Everything random in training draws from torch's generators (numpy generators are seeded with explicit integers), so the states
of torch's generators are all that has to be saved.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with one integer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else (stable across processes and versions)."""
    # joined by a character that no part contains, so that ("a", "bc") and ("ab", "c") differ
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class RngState:
    """The state of torch's CPU generator and of the current accelerator's, if there is one.

    Attributes:
        cpu: uint8 state of the CPU generator.
        device: uint8 state of the current CUDA device's generator, or None without CUDA.
    """

    cpu: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def capture(cls) -> RngState:
        """Copy the current state."""
        device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), device)

    def restore(self) -> None:
        """Restore the captured state, so that the next random draws repeat."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)
