"""A manifest for tests of this folder."""

from dataclasses import asdict, replace
from typing import Any

from unified_lm.data.prompts.templates import get_template
from unified_lm.export.manifest import AdapterRecord, DataRecord, Manifest, StageRecord


def make_manifest(**changes: Any) -> Manifest:
    adapter = AdapterRecord(r=4, alpha=8.0, target_modules=("q_proj", "v_proj"), dropout=0.05)
    manifest = Manifest(
        recipe="grit_tiny",
        base_model="org/base",
        base_license="apache-2.0",
        family="llama",
        template="grit",
        template_fields=asdict(get_template("grit")),
        instructions={"query": "Find the passage."},
        max_tokens=64,
        dtype="float32",
        stages=(
            StageRecord(recipe="mntp", steps=10, run_id="a", adapter=adapter),
            StageRecord(recipe="grit_tiny", steps=5, settings={"learning_rate": 2e-5}),
        ),
        data=(DataRecord(stream="pairs", name="pydocs", fingerprint="abc", num_rows=12),),
        metrics={"retrieval nDCG@10": {"before": 0.3, "after": 0.6851}},
    )
    return replace(manifest, **changes)
