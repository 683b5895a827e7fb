"""Weights that training leaves as they are: which, in what kinds of training, and what is said of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.small_run import small_run, tensors
from tests.processes import NEEDS_DEEPSPEED, Group
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.core.errors import ModelError
from unified_lm.engine.accounting.estimate import estimate
from unified_lm.models.frozen import freeze
from unified_lm.models.tiny import tiny_model


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def run(folder: Path, name: str, *more: str) -> Path:
    arguments = small_run(folder, folder / name, "max_steps=2", "export.enabled=true", "export.verify=off", *more)
    if not any("zero" in argument for argument in more):
        return train(arguments)
    group = Group(arguments, 2, folder / f"{name}.log")  # DeepSpeed does not start twice in a process
    assert group.wait() == [0, 0], group.output()
    return folder / name


@pytest.mark.parametrize(
    ("family", "backend", "frozen"),
    [
        ("monet", "single", "router"),
        ("mixtral", "single", "gate"),
        ("llama", "single", "embed_tokens"),
        pytest.param("monet", "zero2", "router", marks=NEEDS_DEEPSPEED),
        pytest.param("monet", "zero3", "router", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    ],
)
def test_frozen_weights_stay_bit_for_bit(tmp_path, family, backend, frozen):
    common = [f"model.family={family}", f"parallel.backend={backend}"]
    start = weights(run(tmp_path, "start", *common, "optim.learning_rate=1e-30"))
    trained = weights(run(tmp_path, "trained", *common))
    kept = run(tmp_path, "kept", *common, f"optim.frozen=[{frozen}]")
    after = weights(kept)
    own = [name for name in start if f".{frozen}." in f".{name}." and "norm" not in name]
    assert own
    for name in own:
        assert torch.equal(start[name], after[name]), name
        assert not torch.equal(start[name], trained[name]), f"{name}: else the test cannot fail"
    others = [name for name in start if f".{frozen}." not in f".{name}." and start[name].is_floating_point()]
    assert sum(not torch.equal(start[name], after[name]) for name in others) > len(others) / 2
    notices = json.loads((kept / "run.json").read_text())["model"]["notices"]
    assert any(notice.startswith(f"{frozen}: ") and "stay as they are" in notice for notice in notices)
    saved = tensors(next(iter(sorted((kept / "checkpoints").glob("step-*")))))
    assert not any(f".{frozen}." in f".{name}" for name in saved if not name.startswith("buffer/"))


def test_adapters_stay_out_of_frozen_modules(tmp_path):
    start = weights(run(tmp_path, "start", "model.family=llama", "lora=all_linear", "optim.learning_rate=1e-30"))
    after = weights(run(tmp_path, "kept", "model.family=llama", "lora=all_linear", "optim.frozen=[mlp]"))
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed
    assert not any(".mlp." in name for name in changed)


def test_the_estimate_counts_what_is_trained():
    for recipe, frozen in (("monet_chat", 6 * 2 * 2048 * 4096), ("monet_1.4b", 0)):
        config = compose_run([f"recipe={recipe}"])
        found = estimate(config)
        assert found.num_parameters - found.num_trainable == frozen


def test_names_that_match_nothing_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"optim\.frozen: 'mpl' matches no module.*Did you mean 'mlp'\?"):
        freeze(model, ["mpl"])
    with pytest.raises(ModelError, match="nothing is left to train"):
        freeze(model, ["model", "lm_head"])
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing has changed"
    tied = tiny_model("llama", tie_word_embeddings=True)
    freeze(tied, ["lm_head"])
    assert not tied.get_input_embeddings().weight.requires_grad, "one parameter of two names"
    line = freeze(model, ["mlp.up_proj", "layers.0"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if ".mlp.up_proj." in name or name.startswith("model.layers.0.")
    }
    assert f"{len(frozen)} tensors" in line
