"""A copy of an export whose vectors are standardized, or made with routing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_json, write_text
from unified_lm.core.outputs import write_folder
from unified_lm.export.directory import template_of
from unified_lm.export.manifest import FILE_NAME, STANDARDIZED, Manifest, StandardizerRecord
from unified_lm.export.model_card import model_card
from unified_lm.export.sentence_transformers_files import read_prompts, sentence_transformers_modules
from unified_lm.export.standardizer_files import save_standardizer, standardizer_folder
from unified_lm.export.verify import verify_stock_vectors
from unified_lm.models.quiet import quiet_loading
from unified_lm.models.standardizer import Standardizer
from unified_lm.models.weights_hash import check_weights_hash, hash_weights

_MODULES = "modules.json"
_STOCK = (_MODULES, "sentence_bert_config.json", "1_Pooling")
"""By which sentence-transformers takes a folder for one of its models."""


def check_source(source: Path) -> Manifest:
    """The manifest of an export that can be standardized.

    Raises:
        CheckpointError: it is no export, does not embed, or embeds with routing already.
    """
    manifest = Manifest.load(source)
    if not manifest.can_embed:
        raise CheckpointError(f"{source} was exported to generate only: it has no vectors to standardize.")
    if manifest.method != "hs":
        raise CheckpointError(
            f"{source} embeds with method {manifest.method} already. Start from an export that embeds with hidden states: the "
            "one that it was made of, or, if it was trained so, a run with vectors=hs."
        )
    return manifest


def write_standardized(
    source: Path,
    target: Path,
    standardizer: Standardizer,
    record: StandardizerRecord,
    *,
    method: str = "hs",
    alpha: float = 1.0,
    verify: bool = True,
) -> Manifest:
    """Copy an export and add a standardizer; it replaces one that the export already has.

    The folder appears only once it is complete and stock sentence-transformers computes our vectors with it. A copy that embeds
    with routing has no files of sentence-transformers, which cannot compute its vectors; its card says so.

    Args:
        source: the export.
        target: the folder to create, or to replace where it is such a copy; not `source` or a folder in it.
        standardizer: fitted on vectors of this export that are not standardized.
        record: origin of its statistics.
        method: what the copy makes vectors of (`models.moee`). With routing, the statistics are of method "moee_concat".
        alpha: weight of the routing in method "moee_sum".
        verify: whether to check with sentence-transformers, in float32.

    Returns:
        The manifest of the copy.

    Raises:
        OutputError: `target` holds what this package did not write, or is a file or a link.
        CheckpointError: `source` is not an export or does not embed, `target` lies inside it, a check fails, or the folder
            cannot be written.
    """
    manifest = check_source(source)
    states, routed = manifest.embedding_dim, method != "hs"
    if standardizer.dim <= states if routed else standardizer.dim != states:
        raise CheckpointError(
            f"the statistics have {standardizer.dim} dimensions, the export has {states}{' and its routing more' * routed}."
        )
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise CheckpointError(f"--out {target} lies in the export itself; name another folder.")
    check_weights_hash(source, manifest.weights_hash, always=True)
    old = None if manifest.standardizer is None else standardizer_folder(manifest)
    dim = standardizer.dim - states * (method == "rw")
    complete = replace(manifest, standardizer=record, weights_hash="", method=method, alpha=alpha, embedding_dim=dim)
    written: list[Manifest] = []

    def fill(building: Path) -> None:
        """Copy the export into `building`, add the statistics, and update the files that list them."""
        skipped = shutil.ignore_patterns(*([old] if old else []), *(_STOCK if routed else ()))
        shutil.copytree(source, building, dirs_exist_ok=True, ignore=skipped)
        save_standardizer(standardizer, building / standardizer_folder(complete))
        loads = (building / _MODULES).is_file()
        if loads:
            write_json(building / _MODULES, sentence_transformers_modules(complete))
        final = replace(complete, weights_hash=hash_weights(building))
        (building / FILE_NAME).unlink()
        final.save(building)
        write_text(building / "README.md", model_card(final, read_prompts(building), loads))
        if verify and loads:
            verify_stock_vectors(building, final, template_of(final))
        written.append(final)

    with quiet_loading(reports=False):
        write_folder(target, STANDARDIZED, fill)
    return written[0]
