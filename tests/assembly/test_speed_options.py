"""Options that trade memory, time and compilation: the same losses with each on and off, and a resume to the same bits."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.engine.small_run import equal, metrics, small_run, tensors
from tests.processes import NEEDS_DEEPSPEED, Group
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.core.errors import ConfigError

BASE = ("packing.token_budget=64", "packing.num_retained=1", "model.dtype=float32", "checkpoint.every=2")
OPTIONS = {
    "retained": ("packing.num_retained=null",),
    "checkpointing": ("model.gradient_checkpointing=true",),
    "products": ("model.gradient_checkpointing=true", "model.checkpoint_keeps=products"),
    "compile": ("model.compile=true",),
    "compile, all": ("model.compile=true", "model.gradient_checkpointing=true", "packing.num_retained=null", "lora=all_linear"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without options, full and LoRA, and their data."""
    folder = tmp_path_factory.mktemp("plain")
    for name, more in (("full", ()), ("lora", ("lora=all_linear",))):
        train(small_run(folder, folder / name, *BASE, "max_steps=4", *more))
    return folder


@pytest.mark.parametrize("option", OPTIONS)
def test_losses_agree_and_a_resume_gives_the_same_bits(option: str, plain: Path, tmp_path: Path) -> None:
    chosen = (*BASE, *OPTIONS[option])
    train(small_run(plain, tmp_path / "whole", *chosen, "max_steps=4"))
    reference = metrics(plain / ("lora" if "lora=all_linear" in chosen else "full"))
    found = metrics(tmp_path / "whole")
    assert len(found) == len(reference) == 4
    for line, expected in zip(found, reference, strict=True):
        for key in ("loss", "gradient_norm"):
            assert line[key] == pytest.approx(expected[key], rel=2e-6), (option, line["step"], key)
    train(small_run(plain, tmp_path / "cut", *chosen, "max_steps=2"))
    train(small_run(plain, tmp_path / "cut", *chosen, "max_steps=4", "resume=auto"))
    last = "checkpoints/step-00000004"
    assert tensors(tmp_path / "whole" / last)
    assert equal(tensors(tmp_path / "cut" / last), tensors(tmp_path / "whole" / last))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_losses_of_the_embedded_recipe_agree(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """`grit_smollm2` itself, in packs that GradCache forwards twice: two steps with every option."""
    steps = ("max_steps=2", "packing.token_budget=1024", f"model.dtype={dtype}", "seed=3")
    quiet = ("~validation.sources", "~validation.retrieval", "export.enabled=false", "logging.progress=false")
    found = {}
    for name in ("plain", "retained", "checkpointing", "products", "compile"):
        option = OPTIONS.get(name, ())
        kept = () if name == "retained" else ("packing.num_retained=1",)
        train(["recipe=grit_smollm2", f"run_dir={tmp_path / name}", *steps, *quiet, *kept, *option])
        found[name] = metrics(tmp_path / name)
        assert found[name][0]["packs"] > 3
        shutil.rmtree(tmp_path / name)  # 1.6 GB of weights and moments
    for name, lines in found.items():
        for line, expected in zip(lines, found["plain"], strict=True):
            for key in ("loss", "loss/embedding", "loss/generation"):
                assert line[key] == pytest.approx(expected[key], rel=tolerance), (name, line["step"], key)


@NEEDS_DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "zero1", "zero2"])
def test_compiled_blocks_on_two_ranks(parallel: str, plain: Path, tmp_path: Path) -> None:
    for compiled in ("false", "true"):
        arguments = small_run(
            plain, tmp_path / compiled, *BASE, "max_steps=3", f"parallel={parallel}", f"model.compile={compiled}"
        )
        group = Group(arguments, 2, tmp_path / f"log-{compiled}")
        assert group.wait() == [0, 0], group.output()
    losses = [[line["loss"] for line in metrics(tmp_path / compiled)] for compiled in ("false", "true")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def test_what_does_not_go_together_is_refused() -> None:
    for arguments, reason in (
        (("model.compile=true", "parallel=zero3"), "ZeRO-3 gathers weights"),
        (("model.compile=true", "model.attention_kernel=padded"), "the padded kernel has none"),
        (("model.checkpoint_keeps=products",), "nothing is checkpointed"),
        (("model.checkpoint_keeps=everything",), "model.checkpoint_keeps"),
        (("model.compile=true", *OPTIONS["products"]), "show no single matrix products"),
        (("packing.num_retained=0",), "packing.num_retained"),
    ):
        with pytest.raises(ConfigError, match=reason):
            compose_run(["recipe=grit_smollm2", *arguments])


def test_kept_products_take_less_than_everything_and_more_than_inputs() -> None:
    """What autograd really keeps of one pack, against the estimate's formula."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models.test_compiled import random_packs
    from unified_lm.engine.accounting.estimate import activation_bytes
    from unified_lm.engine.accounting.live_tensors import LiveTensors
    from unified_lm.models.backbone import Backbone

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
    )
    pack = next(iter(random_packs(1)))
    kept, said = {}, {}
    for keeps, checkpointed in (("nothing", False), ("inputs", True), ("products", True)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        backbone = Backbone(model, "sdpa")
        if checkpointed:
            backbone.enable_gradient_checkpointing(keeps == "products")
        with LiveTensors() as live:
            states = backbone(pack)
            kept[keeps] = live.now
        states.sum().backward()
        settings = [f"model.gradient_checkpointing={checkpointed}".lower(), "model.dtype=float32"]
        settings += ["model.checkpoint_keeps=products"] if keeps == "products" else []
        said[keeps] = activation_bytes(compose_run(["recipe=grit_smollm2", *settings]), config, len(pack))
    assert kept["inputs"] < kept["products"] < 0.6 * kept["nothing"], kept
    assert said["products"] == pytest.approx(kept["products"], rel=0.35), (said, kept)
