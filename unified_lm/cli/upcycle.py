"""`unified-lm upcycle MODEL --out DIR`: a mixture of experts made of a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unified_lm.cli.arguments import command_parser, from_zero, positive, whole
from unified_lm.core.errors import ConfigError
from unified_lm.core.files import write_json
from unified_lm.core.outputs import FolderKind, check_folder, write_folder

_RECORD = "upcycled.json"
UPCYCLED = FolderKind("upcycled model", _RECORD)


def upcycle(argv: Sequence[str]) -> None:
    """Write a mixture of experts as a checkpoint that recipes train and stock tools load.

    Raises:
        UserError: no such model, a family without a mixture, or settings that make no sense.
    """
    parser = command_parser(
        "upcycle",
        "make a sparse mixture of experts of a dense model: every expert a copy of its feed-forward network",
        "smollm2-135m --experts 8 --noise 0.02 --router-std 0.2 --out runs/smollm2-8x",
        "then train it: unified-lm train recipe=grit_smollm2 model.source=hub model.name=DIR model.family=FAMILY",
    )
    add = parser.add_argument
    add("model", help="a folder, an export, a Hub name, or smollm2-135m")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--experts", type=positive, default=8, help="experts of each layer (8)")
    add("--top-k", type=positive, default=2, help="experts per token (2)")
    add("--parts", type=positive, default=1, help="split each network into so many smaller experts (1)")
    add("--noise", type=from_zero, default=0.0, help="noise on each expert, relative to its weights' deviation (0.0)")
    add("--drop", type=from_zero, default=0.0, help="share of each expert's channels that is drawn anew, such as 0.5 (0.0)")
    add("--router-std", type=from_zero, default=0.02, help="deviation of the routers' weights (0.02); more is less even")
    add("--seed", type=whole, default=0, help="for routers, noise and draws (0)")
    options = parser.parse_args(list(argv))
    check_folder(options.out, UPCYCLED)
    from unified_lm.cli.evaluate_model import find_model
    from unified_lm.inference.loading import load_parts
    from unified_lm.models.quiet import quiet_loading
    from unified_lm.models.upcycle import UpcycleSettings, upcycle

    names = ("experts", "top_k", "parts", "noise", "drop", "router_std", "seed")
    settings = UpcycleSettings(**{name: getattr(options, name) for name in names})
    if problems := list(settings.problems()):
        raise ConfigError(problems)
    found = find_model(options.model)
    if found.folder.resolve() in (options.out.resolve(), *options.out.resolve().parents):
        raise ConfigError(f"--out {options.out} lies in the model itself; name another folder.")
    parts = load_parts(found.folder, device="cpu", needs_manifest=False, needs_head=True, check_weights=True)
    sparse = upcycle(parts.causal_lm, settings)

    def fill(building: Path) -> None:
        """Write what transformers loads, and what it was made of."""
        sparse.save_pretrained(building)
        parts.tokenizer.save_pretrained(building)
        write_json(building / _RECORD, {"model": found.name, "revision": found.revision, **asdict(settings)})

    with quiet_loading(reports=False):
        write_folder(options.out, UPCYCLED, fill)
    millions = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in (parts.causal_lm, sparse)]
    family = sparse.config.model_type
    print(f"{options.out}: {family}, {options.experts} experts, {millions[0]:.0f} -> {millions[1]:.0f} million parameters")
    print(f"train it: unified-lm train recipe=NAME model.source=hub model.name={options.out} model.family={family}")
