"""Published data from small local files of the same schema, and that the recipes read what is written."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from unified_lm.composition.compose import compose_run
from unified_lm.core.errors import DataError
from unified_lm.data.rows import prepare as module
from unified_lm.data.rows.files import file_hash
from unified_lm.data.rows.prepare import Prepared, prepare
from unified_lm.data.rows.published import ECHO_INSTRUCTIONS, PUBLISHED
from unified_lm.data.rows.readers import read_rows
from unified_lm.data.rows.records import PairRecord, RecordKind, Text
from unified_lm.data.sources import open_source

RECIPES = {
    "tulu2": "generative_only",
    "gritlm_tulu2": "generative_only",
    "e5": "embedding_only",
    "echo": "llm2vec_supervised",
    "medi2": "embedding_only",
    "medi2bge": "embedding_only",
    "wiki1m": "llm2vec_simcse",
    "wikitext": "llm2vec_mntp",
    "msmarco": "llm2vec_supervised",
    "allnli": "llm2vec_supervised",
    "ultrafeedback": "kto_gritlm7b",
    "nq": "grit_rag_mistral7b",
}
CHAT = [{"role": "user", "content": "Who wrote Faust?"}, {"role": "assistant", "content": "Goethe."}]
PAIR = {"query": ["Find it:", "who wrote Faust"], "pos": [["", "Goethe wrote it."]], "neg": [["", "It is a city."]]}
TRIPLE = {"query": "who wrote Faust", "positive": "Goethe wrote it.", "negative": "It is a city."}


def jsonl(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A folder per data set, in the schema of the published one."""
    root = tmp_path / "local"
    parquet(
        root / "tulu2" / "data" / "train-00000-of-00001.parquet",
        {"dataset": "flan_v2", "id": "flan_v2_0", "messages": CHAT},
        {"dataset": "hard_coded", "id": "hard_coded_3", "messages": CHAT},
        {"dataset": "tulu.hard_coded", "id": "x", "messages": CHAT},
        {"dataset": "sharegpt", "id": "sharegpt_1", "messages": CHAT[:1]},
        {"dataset": "sharegpt", "id": "sharegpt_2", "messages": [CHAT[0], {"role": "assistant", "content": " "}]},
    )
    for split in ("train_prefs", "test_prefs"):
        other = [CHAT[0], {"role": "assistant", "content": "Schiller."}]
        row = {"prompt": CHAT[0]["content"], "chosen": CHAT, "rejected": other, "score_chosen": 9.0}
        parquet(root / "ultrafeedback" / "data" / f"{split}-00000-of-00001.parquet", row)
    jsonl(root / "gritlm_tulu2" / "tulu2.jsonl", {"text": ["Who wrote Faust?", "Goethe."]})
    for name in ("e5", "medi2", "medi2bge"):
        jsonl(root / name / "nq.jsonl", PAIR, {**PAIR, "pos": [["", "  "]]})
        jsonl(root / name / "nested.v2.jsonl", PAIR)
    jsonl(root / "echo" / "allnli.jsonl", TRIPLE, TRIPLE, {**TRIPLE, "negative": ""})
    jsonl(root / "echo" / "quora_duplicates_split2.jsonl", TRIPLE)
    jsonl(root / "echo" / "msmarco_passage.jsonl", TRIPLE)
    (root / "wiki1m").mkdir()
    (root / "wiki1m" / "wiki1m_for_simcse.txt").write_text("YMCA in South Australia\n\n South Australia has centres. \n")
    parquet(root / "wikitext" / "train-00000.parquet", {"text": ""}, {"text": " = Title = \n"}, {"text": " Some words . \n"})
    parquet(root / "wikitext" / "validation-00000.parquet", {"text": " Other words . \n"})
    jsonl(
        root / "msmarco" / "msmarco-triplets.jsonl", {"query": "who wrote Faust", "pos": ["Goethe."], "neg": ["A city.", "A"]}
    )
    passages = [{"docid": "1", "title": "Faust", "text": "Goethe wrote it."}, {"docid": "2", "title": "", "text": "A city."}]
    question = {"query": "who wrote Faust", "answers": ["Goethe"], "negative_passages": passages[1:]}
    for split in ("train", "dev"):
        rows = [{**question, "positive_passages": passages[:1]}, {**question, "positive_passages": []}]
        jsonl(root / "nq" / f"{split}.jsonl", *rows)
    parquet(root / "allnli" / "train.parquet", {"anchor": "A man eats.", "positive": "He eats.", "negative": "He sleeps."})
    return root


def overrides(done: Prepared) -> list[str]:
    return shlex.split(done.use)


def test_every_published_set_is_tested() -> None:
    assert RECIPES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_recipe_reads_what_is_written(name: str, local: Path, tmp_path: Path) -> None:
    """The overrides that `prepare` names compose, and every source they lead to opens with the kind of its stream."""
    done = prepare(name, tmp_path / "data", local=local / name)
    data = [override for override in overrides(done) if override.startswith("data=")]
    values = [override for override in overrides(done) if not override.startswith("data=")]
    config = compose_run([f"recipe={RECIPES[name]}", "model=tiny_random", *data, *values])
    kinds = {"pairs": RecordKind.PAIR, "chat": RecordKind.CHAT, "preference": RecordKind.PREFERENCE}
    kinds["grounded"] = RecordKind.GROUNDED
    rows = 0
    streams = [
        stream for stream in config.streams.values() if kinds.get(stream.format, RecordKind.TEXT) is PUBLISHED[name].kind
    ]
    for stream in streams:
        for source in stream.sources:
            assert source.path is not None
            assert Path(source.path).is_relative_to(tmp_path / "data")
            rows += len(open_source(source, kinds.get(stream.format, RecordKind.TEXT), 0))
    held_out = done.num_rows - rows
    assert held_out == {"wikitext": 1, "ultrafeedback": 2, "nq": 1}.get(name, 0)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_manifest(name: str, local: Path, tmp_path: Path) -> None:
    done = prepare(name, tmp_path / "data", local=local / name)
    manifest = yaml.safe_load(done.manifest.read_text())
    assert manifest["license"]
    assert manifest["rows"] == done.num_rows == sum(file["rows"] for file in manifest["files"])
    assert manifest["dropped"] == dict(done.dropped)
    for path, entry in zip(done.files, manifest["files"], strict=True):
        assert entry["sha256"] == file_hash(path)
        assert sum(1 for _ in read_rows(path)) == entry["rows"]


def test_tulu2_leaves_out_custom_prompts(local: Path, tmp_path: Path) -> None:
    done = prepare("tulu2", tmp_path, local=local / "tulu2")
    assert done.num_rows == 1
    assert done.dropped == {
        "custom prompt about the model's origin (hard_coded)": 2,
        "no assistant turn": 1,
        "empty messages[*].content after stripping": 1,
    }


def test_echo_gets_its_instructions(local: Path, tmp_path: Path) -> None:
    done = prepare("echo", tmp_path, local=local / "echo")
    rows = {path.stem: [row for _, row in read_rows(path)] for path in done.files}
    first, second = ECHO_INSTRUCTIONS["allnli"]
    assert [row["query"][0] for row in rows["allnli"]] == [first, second]
    assert rows["allnli"][1]["pos"] == [["", "Goethe wrote it."]]
    symmetric = ECHO_INSTRUCTIONS["quora_duplicates"][1]
    assert rows["quora_duplicates_split2"][0]["neg"] == [[symmetric, "It is a city."]]
    assert done.dropped == {"empty neg[*][*] after stripping": 1}


def test_parquet_holds_the_same_records(local: Path, tmp_path: Path) -> None:
    written = [prepare("medi2", tmp_path / suffix, local=local / "medi2", suffix=suffix) for suffix in (".jsonl", ".parquet")]
    assert [path.name for path in written[1].files] == ["nested.v2.parquet", "nq.parquet"]
    contents = []
    for done in written:
        path = Path(overrides(done)[1].partition("=")[2])
        config = compose_run(["recipe=embedding_only", "model=tiny_random", f"data.e5_path={path}"])
        contents.append(list(open_source(config.streams["embedding"].sources[0], RecordKind.PAIR, 0)))
    expected = PairRecord(Text("who wrote Faust", "Find it"), (Text("Goethe wrote it."),), (Text("It is a city."),))
    assert contents == [[expected] * 2] * 2


def test_limit_reads_the_first_rows(local: Path, tmp_path: Path) -> None:
    assert prepare("wikitext", tmp_path, local=local / "wikitext", limit=2).num_rows == 2  # one of them blank


def test_hub_rows_come_at_a_pinned_commit(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that the Hub names is what is read, and what the manifest says."""
    seen = []

    def hub_rows(config):
        seen.append(config)
        return config.hub, "", lambda: read_rows(local / "tulu2" / "data" / "train-00000-of-00001.parquet")

    monkeypatch.setattr(module, "_commit", lambda name, spec, revision: "f" * 40)
    monkeypatch.setattr(module, "hub_rows", hub_rows)
    done = prepare("tulu2", tmp_path)
    assert [(config.hub, config.split, config.revision) for config in seen] == [
        ("allenai/tulu-v2-sft-mixture", "train", "f" * 40)
    ]
    assert yaml.safe_load(done.manifest.read_text())["commit"] == "f" * 40


def test_datasets_reads_the_layout_of_the_hub(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real `datasets.load_dataset` on a folder in the Hub's layout, in place of the Hub name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(module, "_commit", lambda name, spec, revision: None)
    monkeypatch.setitem(module.published.__globals__, "PUBLISHED", {"tulu2": _at(local / "tulu2")})
    assert prepare("tulu2", tmp_path / "data").num_rows == 1


def _at(folder: Path):
    from dataclasses import replace

    return replace(PUBLISHED["tulu2"], hub=str(folder))


def test_mistakes(local: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "echo" / "fevr.jsonl", TRIPLE)
    jsonl(tmp_path / "empty" / "a.jsonl", {**PAIR, "query": ["x", ""]})
    with pytest.raises(DataError, match=r"unknown data set 'tulu'\. Did you mean 'tulu2'"):
        prepare("tulu", tmp_path)
    with pytest.raises(DataError, match=r"e5 needs --from FOLDER\. E5S was never published"):
        prepare("e5", tmp_path)
    with pytest.raises(DataError, match="revision is for data from the Hub"):
        prepare("tulu2", tmp_path, local=local, revision="main")
    with pytest.raises(DataError, match=r"format 'csv': expected jsonl or parquet"):
        prepare("tulu2", tmp_path, local=local / "tulu2", suffix=".csv")
    with pytest.raises(DataError, match="limit: got 0"):
        prepare("tulu2", tmp_path, local=local / "tulu2", limit=0)
    with pytest.raises(DataError, match=r"nested\.v2\.jsonl, line 1, field 'messages': got no such column"):
        prepare("tulu2", tmp_path, local=local / "e5")
    with pytest.raises(DataError, match=r"not one of the data sets.*Did you mean 'fever'"):
        prepare("echo", tmp_path, local=tmp_path / "echo")
    with pytest.raises(DataError, match="has no file of the split 'train'"):
        prepare("wikitext", tmp_path, local=local / "msmarco")
    with pytest.raises(DataError, match="no row is left"):
        prepare("e5", tmp_path, local=tmp_path / "empty")


def test_a_broken_row_leaves_no_file(local: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "in" / "nq.jsonl", PAIR, {**PAIR, "pos": 3})
    with pytest.raises(DataError, match=r"nq\.jsonl, line 2, field 'pos': got 3"):
        prepare("e5", tmp_path / "out", local=tmp_path / "in")
    assert not (tmp_path / "out").exists()


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(name for name, spec in PUBLISHED.items() if spec.hub))
def test_the_hub_has_it(name: str, tmp_path: Path) -> None:
    assert prepare(name, tmp_path, limit=100).num_rows > 0


def test_files_of_one_name_are_kept_apart(local: Path, tmp_path: Path) -> None:
    source = next(path for path in (local / "medi2").rglob("*.jsonl*") if path.is_file())
    for part in ("s1", "s2"):
        (tmp_path / "in" / part).mkdir(parents=True)
        shutil.copyfile(source, tmp_path / "in" / part / source.name)
    done = prepare("medi2", tmp_path / "out", local=tmp_path / "in")
    assert len(set(done.files)) == 2
    assert done.num_rows == sum(sum(1 for _ in read_rows(path)) for path in done.files)
    shutil.copyfile(source, tmp_path / "in" / "s1" / source.name.replace(".jsonl", ".json"))
    with pytest.raises(DataError, match="would both be written"):
        prepare("medi2", tmp_path / "again", local=tmp_path / "in")
    assert not (tmp_path / "again").exists()
