"""Reading a parity case."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


class Case:
    """One case of the parity set: its parameters, its tensors, and a comparison at its own tolerance."""

    def __init__(self, shared_dir: Path, name: str) -> None:
        folder = shared_dir / "parity"
        cases = json.loads((folder / "manifest.json").read_text())["cases"]
        self.entry = next(case for case in cases if case["id"] == name)
        self.params = self.entry["params"]
        self.tensors = load_file(folder / self.entry["file"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def weights(self) -> dict[str, torch.Tensor]:
        """The checkpoint, where the case has one."""
        return {key.removeprefix("weight/"): value for key, value in self.tensors.items() if key.startswith("weight/")}

    def check(self, found: torch.Tensor, name: str, precision: str | None = None) -> None:
        """Compare with `output/NAME` at the tolerance of `precision`, by default that of `found`."""
        tolerance = self.entry["tolerance"]["default"][precision or str(found.dtype).removeprefix("torch.")]
        torch.testing.assert_close(found, self.tensors[f"output/{name}"], **tolerance, check_dtype=False)
