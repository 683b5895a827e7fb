"""Arguments -> configuration: groups, dotted keys, every problem at once."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unified_lm.composition import compose as composition
from unified_lm.composition import locate
from unified_lm.composition.compose import compose, compose_run, from_yaml, to_yaml
from unified_lm.composition.locate import group_options
from unified_lm.config.schema import ChainConfig, RunConfig, SourceConfig, SweepConfig
from unified_lm.core.errors import ConfigError


def problems_of(*argv: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    return caught.value.problems


def test_folders_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "from").mkdir()
    places = ["run_dir='~/x'", "resume='~/from'", "checkpoint.copy_to='~/copies'"]
    config = compose_run(["recipe=grit_smollm2", "model=tiny_random", *places])
    assert (config.run_dir, config.resume, config.checkpoint.copy_to) == (
        *(str(tmp_path / name) for name in ("x", "from", "copies")),
    )
    chain = compose(["recipe=llm2vec", "model=tiny_random", "run_dir='~/x'"])
    assert isinstance(chain, ChainConfig)
    assert chain.run_dir == str(tmp_path / "x")
    assert chain.stages[0].run_dir == str(tmp_path / "x" / "1-llm2vec_mntp")
    sweep = compose(["recipe=ablation_attention", "model=tiny_random", "run_dir='~/x'"])
    assert isinstance(sweep, SweepConfig)
    assert sweep.arms[0].run.run_dir == f"{tmp_path}/x/{sweep.arms[0].name}-seed{sweep.arms[0].run.seed}"
    written = compose_run(["recipe=grit_smollm2", "model=tiny_random", "run_dir='./~x'"])
    assert written.run_dir == "./~x", "what begins otherwise is as it was"
    for arguments in (["recipe=grit_smollm2"], ["recipe=llm2vec"], ["recipe=ablation_attention"]):
        told, *_ = problems_of(*arguments, "model=tiny_random", "run_dir='~nobody_of_that_name/x'")
        assert told.startswith("run_dir: ~nobody_of_that_name/x: there is no user of that name.")


def test_values_of_every_kind_reach_their_fields() -> None:
    config = compose_run(
        [
            "recipe=llm2vec_mntp",
            "model=llama2_7b",
            "optim=cosine",
            "max_steps=7",
            "optim.learning_rate=1e-3",
            "optim.betas=[0.9,0.95]",
            "lora.target_modules=[q_proj,v_proj]",
            "streams.mntp.sources=[{path: 'a b.txt', weight: 2}]",
            "streams.mntp.sources.0.limit=5",
            "push_to_hub=org/name",
            "run_dir='runs/a, b'",
            "model.revision=null",
            "~lora.dropout",
        ]
    )
    assert (config.max_steps, config.optim.learning_rate, config.optim.betas) == (7, 1e-3, (0.9, 0.95))
    assert config.optim.schedule == "cosine"
    assert config.model.name == "meta-llama/Llama-2-7b-chat-hf"
    assert config.lora is not None
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.streams["mntp"].sources == (SourceConfig(path="a b.txt", weight=2.0, limit=5),)
    assert config.export.push_to_hub == "org/name"
    assert config.run_dir == "runs/a, b"


def test_data_keys_flow_into_the_streams() -> None:
    config = compose_run(["recipe=grit_mistral7b", "data=files", "data.pairs_path=p", "data.chat_path=c"])
    assert config.streams["embedding"].sources == (SourceConfig(path="p"),)
    assert config.streams["generation"].sources == (SourceConfig(path="c"),)
    assert config.streams["embedding"].num_hard_negatives == 0, "the group says how many negatives its rows have"


def test_a_recipe_may_take_several_data_groups_and_an_argument_replaces_them_all() -> None:
    both = compose_run(["recipe=grit_mistral7b"])
    assert both.streams["embedding"].sources[0].path == "data/e5"
    assert both.streams["generation"].sources[0].hub == "allenai/tulu-v2-sft-mixture"
    one = compose_run(["recipe=grit_mistral7b", "data=pydocs"])
    assert {stream.sources[0].builtin for stream in one.streams.values()} == {"pydocs"}
    assert one.validation.retrieval is not None


def test_every_problem_is_reported_at_once_with_a_suggestion() -> None:
    found = problems_of(
        "recipe=llm2vec_mntp",
        "model=lama2_7b",
        "max_steps=many",
        "learning_rate=1",
        "optim.learning_rat=1",
        "streams.mnpt.batch_size=2",
        "streams.mntp.sources.0.pth=x",
        "optim.warmup_steps=3",
        "optim.warmup_ratio=0.1",
        "seed=1,2",
        "x=[",
        "~nothing",
        "hydra.run.dir=x",
    )
    text = "\n".join(found)
    assert len(found) == 11
    assert "unknown model 'lama2_7b'. Did you mean 'llama2_7b'?" in text
    assert "max_steps: got 'many' (str), expected a whole number." in text
    assert "unknown key 'learning_rate'. Did you mean 'optim.learning_rate'?" in text
    assert "unknown key 'optim.learning_rat'. Did you mean 'optim.learning_rate'?" in text
    assert "unknown stream in 'streams.mnpt.batch_size'. Did you mean 'mntp'?" in text
    assert "unknown key 'streams.mntp.sources.0.pth'. Did you mean 'streams.mntp.sources.0.path'?" in text
    assert "optim.warmup_steps=3 and optim.warmup_ratio=0.1 exclude each other" in text
    assert "'seed=1,2': a run takes one value; write a list as [a,b]." in text
    assert "cannot read the argument 'x=['" in text
    assert "~nothing: there is no such key" in text
    assert "'hydra.run.dir' cannot be set here" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no recipe given"),
        (["recipe=grit_smollm"], "unknown recipe 'grit_smollm'. Did you mean 'grit_smollm2'?"),
        (["recipe=no/such.yaml"], "there is no such file"),
        (["recipe=grit_smollm2", "recipe=llm2vec"], "given 2 times"),
        (["recipe=grit_smollm2", "lora.r=4"], "choose one first, such as lora=llm2vec"),
        (["recipe=grit_smollm2", "data.path=x"], "unknown key 'data.path'"),
        (["recipe=grit_smollm2", "max_steps.x=1"], "max_steps is a single value"),
        (["recipe=generative_only", "data=e5"], "choose data=... that offers such rows"),
        (["recipe=grit_smollm2", "model.dtype=bf16"], "model.dtype: unknown value 'bf16'"),
        (["recipe=grit_smollm2", "packing=paked"], "unknown packing 'paked'. Did you mean 'packed'?"),
    ],
)
def test_each_mistake_has_its_message(argv: list[str], message: str) -> None:
    assert message in "\n".join(problems_of(*argv))


def test_a_recipe_of_the_users_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [grit_smollm2, _self_]\ndescription: mine\nmax_steps: 3\noptim: {learning_rate: 1e-4}\n")
    config = compose_run([f"recipe={mine}", "lora=llm2vec"])
    assert (config.recipe, config.max_steps, config.optim.learning_rate) == ("mine", 3, 1e-4)
    assert set(config.streams) == {"embedding", "generation"}
    assert config.lora is not None


def test_a_faulty_recipe_of_the_users_own_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("defaults: [\nmax_steps: 3")
    assert "broken.yaml" in problems_of(f"recipe={broken}")[0]
    broken.write_text("")
    assert "expected the keys and values" in problems_of(f"recipe={broken}")[0]
    broken.write_text("defaults: [{model: nothing}, _self_]\n")
    assert "nothing" in problems_of(f"recipe={broken}")[0]


def test_the_resolved_yaml_is_enough_to_start_again(tmp_path: Path) -> None:
    config = compose_run(["recipe=llm2vec_simcse", "model=smollm2_135m", "max_steps=9", f"run_dir={tmp_path}"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert from_yaml(saved) == config
    assert compose([f"recipe={saved}"]) == config
    again = compose_run([f"recipe={tmp_path}", "max_steps=4"])
    assert (again.max_steps, again.streams) == (4, config.streams)
    assert "resolved configuration without groups" in problems_of(f"recipe={saved}", "model=llama2_7b")[0]


def test_an_old_or_edited_resolved_yaml_lists_its_problems(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    text = to_yaml(compose(["recipe=grit_smollm2"]))
    saved.write_text(text.replace("max_steps: 50", "max_stps: 50").replace("schedule: linear", "schedule: linaer"))
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*'max_steps'(.|\n)*'linear'"):
        from_yaml(saved)


def test_a_chain_composes_its_stages_with_shared_and_own_arguments() -> None:
    chain = compose(
        [
            "recipe=llm2vec",
            "model=smollm2_135m",
            "seed=5",
            "run_dir='runs/x'",
            "push_to_hub=org/name",
            "llm2vec_mntp.max_steps=11",
            "llm2vec_simcse.lora=none",
            "~llm2vec_simcse.validation.retrieval",
        ]
    )
    assert isinstance(chain, ChainConfig)
    mntp, simcse = chain.stages
    assert [stage.recipe for stage in chain.stages] == ["llm2vec_mntp", "llm2vec_simcse"]
    assert [stage.run_dir for stage in chain.stages] == ["runs/x/1-llm2vec_mntp", "runs/x/2-llm2vec_simcse"]
    assert {stage.seed for stage in chain.stages} == {5}
    assert mntp.max_steps == 11 != simcse.max_steps
    assert mntp.lora is not None
    assert simcse.lora is None
    assert simcse.validation.retrieval is None
    assert mntp.export.push_to_hub is None, "only the last stage's result is published"
    assert simcse.export.push_to_hub == "org/name"


def test_a_chain_reports_the_problems_of_all_stages(tmp_path: Path) -> None:
    found = problems_of("recipe=llm2vec", "llm2vec_mntp.max_stps=1", "llm2vec_simcse.optim.schedule=x")
    assert [problem.partition(":")[0] for problem in found] == ["stage llm2vec_mntp", "stage llm2vec_simcse"]
    (problem,) = problems_of("recipe=llm2vec", "data.wiki1m=sentences.txt")
    assert problem.startswith("stage llm2vec_mntp: unknown key 'data.wiki1m'")
    assert problem.endswith("What one stage alone has is set as STAGE.KEY=VALUE.")
    assert compose(["recipe=llm2vec", "llm2vec_simcse.data.wiki1m=sentences.txt"]).stages[1].streams["simcse"].sources
    with pytest.raises(ConfigError, match="choose one of its stages: llm2vec_mntp, llm2vec_simcse"):
        compose_run(["recipe=llm2vec"])
    saved = tmp_path / "chain.yaml"
    chain = compose(["recipe=llm2vec"])
    saved.write_text(to_yaml(chain))
    assert from_yaml(saved) == chain


def test_another_name_forgets_the_architecture_of_the_first() -> None:
    config = compose_run(["recipe=llm2vec_mntp", "model=qwen3", "model.name=Qwen/Qwen3-8B"])
    assert config.model.architecture == {}
    assert compose_run(["recipe=llm2vec_mntp", "model=qwen3"]).model.architecture["hidden_size"] == 1024


def test_composition_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from unified_lm.composition.compose import compose; compose(['recipe=grit_smollm2']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_run_config_is_what_a_recipe_gives() -> None:
    assert isinstance(compose(["recipe=grit_smollm2"]), RunConfig)


@pytest.mark.parametrize(
    "argument",
    [
        "streams.generation.objective={name: unified_lm.objectives.token.NextToken}",
        "streams.generation={objective: {name: unified_lm.objectives.token.NextToken}}",
    ],
)
def test_another_objective_keeps_the_weight_and_nothing_else(argument: str) -> None:
    objective = compose_run(["recipe=grit_mixtral8x7b", argument]).streams["generation"].objective
    assert (objective.weight, objective.normalization, objective.router_balance) == (0.003, "token", 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("chain: ['{file}']", "stage .*: recipe 'own' is a chain"),
        ("ablation: {{base: {{'{file}': []}}, arms: {{a: []}}}}", "arm a: recipe 'own' is an ablation of several runs"),
        ("defaults: [own, _self_]", r"recipe .*/own\.yaml: its defaults lead back to themselves; remove one"),
        ("defaults: [other, _self_]", r"recipe .*/own\.yaml: its defaults lead back to themselves; remove one"),
    ],
)
def test_a_recipe_that_names_itself_is_refused(tmp_path, content, message):
    file = tmp_path / "own.yaml"
    (tmp_path / "other.yaml").write_text("defaults: [own, _self_]")
    file.write_text(content.format(file=file))
    with pytest.raises(ConfigError, match=message):
        compose([f"recipe={file}"])


@pytest.mark.parametrize("recipe", ["grit_smollm2", "llm2vec", "ablation_loss"])
def test_composing_again_gives_the_same(recipe: str) -> None:
    """Also after other data were composed in between: nothing that is shared is changed in place."""
    arguments = [f"recipe={recipe}", "model=tiny_random", "run_dir=runs/test"]
    first = compose(arguments)
    held_out = "validation.sources={}" if recipe == "llm2vec" else "data.held_out.pairs=[{path: other}]"
    compose([*arguments, held_out])
    compose(["recipe=grit_mistral7b", "data=files", "data.pairs_path=p", "data.chat_path=c"])
    assert compose(arguments) == first


def test_what_is_remembered_of_our_files_is_forgotten_when_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes and groups of the package are read once; a changed option, recipe or an added file is seen by the next call."""
    for folder in (locate.configs_dir(), locate.recipes_dir()):
        shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.setattr(locate, "_folder", lambda name: tmp_path / name)
    composed: list[str] = []
    real = composition.hydra_compose
    monkeypatch.setattr(composition, "hydra_compose", lambda name, **more: composed.append(name) or real(name, **more))
    argv = ["recipe=generative_only", "optim=cosine"]
    first = compose_run(argv)
    assert compose_run([*argv, "max_steps=7"]) == replace(first, max_steps=7)
    assert compose_run(argv) == first, "what the second call has set is not in what is remembered"
    assert composed == ["generative_only"]
    option = tmp_path / "configs" / "optim" / "cosine.yaml"
    option.write_text(f"{option.read_text()}eps: 1.0e-3\n")
    assert compose_run(argv).optim == replace(first.optim, eps=1e-3)
    recipe = tmp_path / "recipes" / "generative_only.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: ", "max_steps: 1"))
    assert compose_run(argv).max_steps == int(f"1{first.max_steps}")
    assert composed == ["generative_only"] * 3


def test_composing_imports_neither_torch_nor_transformers() -> None:
    """Descriptions of formats and objectives stand apart from what they describe; a mistake in an argument is told at once."""
    code = (
        "import sys; from unified_lm.composition.compose import compose; compose(['recipe=grit_smollm2']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft"} & set(done.stdout.split())


def sources_of(*argv: str) -> dict[str, tuple[SourceConfig, ...]]:
    return {name: stream.sources for name, stream in compose_run(list(argv)).streams.items()}


def test_a_source_may_be_one_text() -> None:
    found = sources_of("recipe=grit_mistral7b", "data.tulu2=chats.jsonl", "streams.embedding.sources=[a b.csv,hub:x/y:c:dev]")
    tulu, hub = SourceConfig(path="chats.jsonl"), SourceConfig(hub="x/y", subset="c", split="dev")
    assert found == {"embedding": (SourceConfig(path="a b.csv"), hub), "generation": (tulu,)}
    config = compose_run(
        ["recipe=grit_mistral7b", "data.held_out.pairs=t.jsonl", "validation.retrieval={queries: builtin:pydocs}"]
    )
    assert config.validation.sources == {"embedding": (SourceConfig(path="t.jsonl"),)}
    assert config.validation.retrieval is not None
    assert config.validation.retrieval.queries == SourceConfig(builtin="pydocs")
    along = sources_of("recipe=monet_850m", "data.fineweb_edu=stream:rows")["text"]
    assert along == (SourceConfig(path="rows", streaming=True),)
    found = sources_of("recipe=grit_mistral7b", "data.e5=rows", "streams.embedding.sources.0.instruction=Find it")
    assert found["embedding"] == (SourceConfig(path="rows", instruction="Find it"),)


def test_every_published_data_group_takes_rows_by_its_own_name() -> None:
    """`data.NAME=FILE`, and the older `data.NAME_path=FILE` where there was one."""
    recipes = {"e5": "embedding_only", "echo": "llm2vec_supervised", "tulu2": "generative_only", "wiki1m": "llm2vec_simcse"}
    recipes |= {"ultrafeedback": "kto_gritlm7b", "wikitext103": "llm2vec_mntp"}
    recipes |= {"fineweb_edu": "monet_850m", "starcoder": "monet_code", "smoltalk": "monet_chat"}
    assert {*recipes, "nq", "pydocs", "files"} == set(group_options()["data"])
    for group, recipe in recipes.items():
        (sources,) = sources_of(f"recipe={recipe}", f"data.{group}=mine").values()
        assert sources == (SourceConfig(path="mine"),), group
    for group in ("e5", "echo", "wiki1m"):
        (sources,) = sources_of(f"recipe={recipes[group]}", f"data.{group}_path=mine").values()
        assert sources == (SourceConfig(path="mine"),), group


def test_published_groups_of_several_files() -> None:
    assert sources_of("recipe=grit_rag_mistral7b", "data.nq=mine.jsonl")["grounded"] == (SourceConfig(path="mine.jsonl"),)
    config = compose_run(["recipe=kto_gritlm7b", "data.ultrafeedback_path=mine"])
    training, held_out = next(iter(config.streams.values())).sources, next(iter(config.validation.sources.values()))
    assert [training, held_out] == [(SourceConfig(path=f"mine/{name}.jsonl"),) for name in ("train", "test")]


def test_a_mistyped_key_of_the_data_is_corrected_with_its_section() -> None:
    found = problems_of("recipe=grit_mistral7b", "data.tulu=x", "tulu2=x", "data.e.x=x", "data.held_out.pair=x")
    assert list(found) == [
        "unknown key 'data.tulu'. Did you mean 'data.tulu2'?",
        "unknown key 'tulu2'. Did you mean 'data.tulu2'?",
        "unknown key 'data.e.x'. Did you mean 'data.e5'?",
        "unknown key 'data.held_out.pair'. Did you mean 'data.held_out.pairs'?",
    ]


def _recipe(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return f"recipe={path}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_steps: ${nothing.there}\n", r"mine\.yaml, key 'max_steps': Interpolation key 'nothing\.there' not found"),
        (
            "optim: {learning_rate: '${oc.env:NO_SUCH_VARIABLE}'}\n",
            r"mine\.yaml, key 'optim\.learning_rate': .*NO_SUCH_VARIABLE",
        ),
        ("a: ${b}\nb: ${a}\n", r"mine\.yaml.*: "),
        ("chain: 5\n", r"chain mine: got 5, expected a list of recipes"),
        ("chain: [grit_smollm2, 3]\n", r"chain mine: got \['grit_smollm2', 3\], expected a list of recipes"),
        ("ablation: {base: {grit_smollm2: []}, arms: {a: []}, default: [b]}\n", "default names 'b', which is no arm"),
        ("ablation: {base: {grit_smollm2: []}, arms: {a: []}, exclude: [[1]]}\n", "expected a list of names of arms"),
        ("defaults: [{}]\n", r"recipe .*mine\.yaml: .*Missing group name"),
        ("defaults: null\n", r"recipe .*mine\.yaml: .*must be a list"),
    ],
)
def test_a_recipe_of_other_types_is_refused_by_name(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        compose([_recipe(tmp_path, text)])


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("validation=5", r"validation: got 5 \(int\), expected keys and values"),
        ("optim=null", r"unknown optim 'none'"),
        ("packing.token_budget=null", r"packing\.token_budget: got None \(null\), expected a whole number"),
        ("streams.embedding.objective=null", r"streams\.embedding\.objective: got None \(null\)"),
        ("max_steps=" + "1" * 30, "max_steps: got a whole number of 30 digits, which no counter holds"),
        ("optim.weight_decay=" + "1" * 400, r"optim\.weight_decay: got a whole number of 400 digits, expected a finite"),
        ("run_dir=${model.nothing}", "key 'run_dir': Interpolation key 'model.nothing' not found"),
        ("recipe=" + "x" * 300, "recipe 'x{60}...': File name too long"),
    ],
)
def test_an_argument_of_another_type_is_refused_under_tiny_random(argument: str, told: str) -> None:
    recipe = [] if argument.startswith("recipe=") else ["recipe=grit_smollm2"]
    with pytest.raises(ConfigError, match=told):
        compose([*recipe, "model=tiny_random", argument])


def test_a_key_that_comes_twice_in_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text("defaults: [grit_smollm2]\nmax_steps: 3\nmax_steps: 4\n")
    with pytest.raises(ConfigError, match="found duplicate key max_steps"):
        compose([f"recipe={recipe}"])
