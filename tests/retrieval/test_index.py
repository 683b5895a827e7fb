"""An index finds what it holds, answers from what it kept, and comes out the same however often it was killed."""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import tokenization_utils_base

from tests.processes import Child
from tests.retrieval.prompts import recorded_prompts
from unified_lm.batch import Block, Sample, make_pack
from unified_lm.config.streams import SourceConfig
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, ModelError, OutputError, UserError
from unified_lm.core.folder_lock import hold_folder
from unified_lm.data.prompts.layouts import LAYOUTS
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.sources import open_source
from unified_lm.inference import UnifiedLM
from unified_lm.retrieval import index as module
from unified_lm.retrieval.documents import Document, text_id
from unified_lm.retrieval.engines import ENGINES, open_engine
from unified_lm.retrieval.index import Index
from unified_lm.retrieval.rerank import Reranker
from unified_lm.retrieval.splitting import fit

WORDS = ("apples", "bears", "clouds", "doors", "eels", "frogs", "gates", "hills")
TEXTS = [f"Document {i} is about {word}." for i, word in enumerate(WORDS)]
QUESTION = "What is document 3 about?"


def documents(count: int) -> list[Document]:
    return [Document(f"d{i}", f"Text {i} " + "word " * (i % 7), f"f, line {i}") for i in range(count)]


@pytest.fixture
def index(tmp_path: Path, model: UnifiedLM) -> Index:
    made = Index.create(tmp_path / "index", model, states=("bidirectional", "causal"), form="float32")
    made.add(TEXTS)
    return made


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_search_is_that_of_the_model(engine: str, tmp_path: Path, model: UnifiedLM) -> None:
    with Index.create(tmp_path / "index", model, engine=engine) as made:
        added = made.add(TEXTS)
        assert (added.added, added.unchanged, added.cut, len(made)) == (8, 0, 0, 8)
        expected = model.search(QUESTION, TEXTS, 8)[0]
        found = made.search(QUESTION, 8)
        assert [passage.document.text for passage in found] == [TEXTS[hit.index] for hit in expected]
        np.testing.assert_allclose([p.score for p in found], [hit.score for hit in expected], atol=1e-5)
        assert made.add(TEXTS).unchanged == 8
    with Index.open(tmp_path / "index", model) as again:
        assert again.search(QUESTION, 8) == found
        again.delete([text_id(TEXTS[0])])
        assert len(again) == 7
        with pytest.raises(DataError, match="no document 'nothing'"):
            again.delete(["nothing"])


@pytest.mark.parametrize("states", ["bidirectional", "causal"])
@pytest.mark.parametrize("mode", LAYOUTS)
def test_an_answer_from_the_cache_is_that_of_one_forward(mode: str, states: str, index: Index) -> None:
    """Greedy tokens after cached blocks equal those of our own forward over the whole prompt under its blocks."""
    with recorded_prompts() as prompts:
        answer = index.answer(QUESTION, k=2, mode=mode, states=states, max_new_tokens=4)
    (prompt,) = prompts
    blocks = () if prompt.past is None else prompt.past.blocks
    if (mode, states) == ("query_cache", "causal"):
        assert blocks == (), "one causal text in front is the plain prompt"
        blocks = (Block(0, prompt.num_cached),)
    assert len(blocks) == sum({"question": 1, "documents": 2}[part] for part in LAYOUTS[mode].blocks)
    assert {block.bidirectional for block in blocks} <= {states == "bidirectional"}
    assert answer.cached_tokens == sum(block.stop - block.start for block in blocks)
    assert (answer.prompt_tokens, len(answer.passages)) == (len(prompt.ids), 2 * LAYOUTS[mode].retrieves)
    ids = prompt.ids.numpy()
    with index.model.borrow_backbone() as backbone, torch.no_grad():
        for _ in range(4):
            hidden = backbone(make_pack([Sample(input_ids=ids, stream="s", blocks=blocks)]))
            ids = np.append(ids, int(backbone.causal_lm.lm_head(hidden[-1]).argmax()))
            if ids[-1] == index.model.prompt_encoder.tokenizer.eos_token_id:
                break
    tokenizer = index.model.prompt_encoder.tokenizer
    assert answer.text == tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True).strip()
    assert 0 < answer.search_seconds < answer.first_token_seconds <= answer.seconds


def test_a_causal_question_in_front_is_the_plain_prompt(index: Index) -> None:
    """The greedy answer from a causal cache of the question equals that of `generate` on the whole prompt, token for token."""
    pieces: list[str] = []
    answer = index.answer(QUESTION, mode="query_cache", states="causal", max_new_tokens=12, on_text=pieces.append)
    model = index.model
    block = model.prompt_encoder.embed([(QUESTION, model.query_instruction)], 96)[0].ids  # type: ignore[union-attr]
    said = LAYOUTS["query_cache"].say(QUESTION, [answer.passages[0].document.text])
    tail = model.prompt_encoder.generation_prompt([("user", said)], continued=True)
    ids = torch.from_numpy(np.concatenate([block, tail]).astype(np.int64))[None]
    with model.borrow_backbone() as backbone, backbone.stock_attention() as stock:
        plain = stock.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert answer.text == model.prompt_encoder.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert "".join(pieces).strip() == answer.text


def test_auto_takes_what_is_stored_and_long_questions_from_their_embedding(tmp_path: Path, model: UnifiedLM) -> None:
    with Index.create(tmp_path / "kept", model) as kept, Index.create(tmp_path / "bare", model, states=()) as bare:
        for each in (kept, bare):
            each.add(TEXTS)
        assert kept.answer(QUESTION, max_new_tokens=1).mode == "document_cache"
        assert bare.answer(QUESTION, max_new_tokens=1).mode == "document_then_query"
        assert bare.num_bytes == 0 < kept.num_bytes
        # Asked for by name, the blocks are read on the spot.
        assert (
            bare.answer(QUESTION, mode="document_cache", max_new_tokens=3).text == kept.answer(QUESTION, max_new_tokens=3).text
        )
    from unified_lm.retrieval.answering import choose_mode

    assert [choose_mode(300, stored) for stored in (True, False)] == ["document_query_cache", "query_cache"]


def test_an_id_with_two_texts_is_an_error_and_a_changed_text_replaces(index: Index) -> None:
    with pytest.raises(DataError, match=r"document 'a' \(b\.jsonl, line 1\) comes a second time, with another text"):
        index.add([Document("a", "one", "a.jsonl, line 1"), Document("a", "two", "b.jsonl, line 1")])
    assert index.add([Document("a", "one"), Document("a", "one")]).added == 1
    index.add([Document("a", "two")])
    assert index.get(["a"]) == [Document("a", "two")]
    (cache,) = index.caches(index.get(["a"]), "bidirectional")
    assert index.model.prompt_encoder.tokenizer.decode(cache.token_ids).endswith("two")


def test_two_threads_do_not_write_at_once(index: Index) -> None:
    def more() -> Iterator[str]:
        yield "The first one."
        with pytest.raises(CheckpointError, match="written by another thread"):
            index.delete([text_id(TEXTS[0])])
        assert index.answer(QUESTION, max_new_tokens=1).mode == "document_cache"
        with pytest.raises(CheckpointError, match="written by another thread"):
            index.add(["The second one."])

    assert index.add(more()).added == 1


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt2"])
def test_a_model_whose_keys_are_not_kept_still_reads_whole_prompts(
    family: str, tmp_path: Path, other_model: Callable[..., UnifiedLM]
) -> None:
    """DeepSeek caches latent vectors; GPT-2's keys cannot move, and need not where a block is at the start."""
    with Index.create(tmp_path / "i", other_model(family=family, bare=True), states=()) as made:
        made.add(TEXTS)
        for mode in ("auto", "document_then_query", "query_then_document", "no_retrieval"):
            assert made.answer(QUESTION, k=2, mode=mode, max_new_tokens=2).cached_tokens == 0
        if family == "deepseek_v2":
            with pytest.raises(ModelError, match="caches"):
                made.answer(QUESTION, mode="document_cache", max_new_tokens=2)
        else:
            assert made.answer(QUESTION, mode="document_cache", max_new_tokens=2).cached_tokens > 0
            with pytest.raises(ModelError):
                made.answer(QUESTION, k=2, mode="document_cache", max_new_tokens=2)


def test_a_question_that_a_block_would_cut_is_not_cut(index: Index) -> None:
    long = "word " * 300
    with pytest.raises(DataError, match="longer than the 96 tokens of a block, which mode query_cache would cut"):
        index.answer(long, mode="query_cache")
    answer = index.answer(long, max_new_tokens=1)
    assert answer.mode == "document_cache"
    assert answer.prompt_tokens > 300


def test_a_damaged_file_is_read_again(index: Index) -> None:
    before = index.answer(QUESTION, mode="document_cache", max_new_tokens=5)
    size = index.num_bytes
    for file in (index.folder / "key_values").rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 0xFF
        file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="altered"):
        after = index.answer(QUESTION, mode="document_cache", max_new_tokens=5)
    assert (after.text, after.mode) == (before.text, "document_cache")
    assert index.answer(QUESTION, max_new_tokens=5).text == before.text
    assert index.num_bytes <= size


def test_stored_states_of_another_text_are_not_used(index: Index) -> None:
    """An indexer that is killed after it stored keys and values has not changed the text yet."""
    index.add([Document("x", "The first text.")])
    (cache,) = index.caches([Document("x", "The first text.")], "causal")
    (other,) = index.caches([Document("x", "Quite another text.")], "causal")
    assert cache.token_ids.tolist() != other.token_ids.tolist()
    text = index.model.prompt_encoder.tokenizer.decode(other.token_ids)
    assert text.endswith("Quite another text.")


def test_the_budget_is_kept_and_what_was_evicted_is_read_again(tmp_path: Path, model: UnifiedLM) -> None:
    with Index.create(tmp_path / "all", model) as whole:
        whole.add(TEXTS)
        one = whole.num_bytes // len(TEXTS)
        expected = [whole.answer(text, mode="document_cache", max_new_tokens=3).text for text in TEXTS]
    with Index.create(tmp_path / "some", model, budget_bytes=3 * one) as some:
        some.add(TEXTS)
        assert 0 < some.num_bytes <= 3 * one
        assert [some.answer(text, mode="document_cache", max_new_tokens=3).text for text in TEXTS] == expected
        assert some.num_bytes <= 3 * one
    with (
        Index.create(tmp_path / "small", model, budget_bytes=1000) as small,
        pytest.raises(UserError, match=r"more than the disk budget of 1,000 bytes"),
    ):
        small.add(TEXTS)


def test_a_text_that_will_be_cut_is_no_news(model: UnifiedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, said = model.prompt_encoder.tokenizer, []
    tokenizer.deprecation_warnings.clear()  # transformers warns once per tokenizer
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    long = "words and words " * 1000
    parts, _ = fit(model, Document("long", long), 96, "split")
    assert len(parts) > 20
    assert len(fit(model, Document("long", long), 96, "cut")[0]) == 1
    Reranker(model).scores("words?", [long])
    assert said == []
    tokenizer(long)
    assert said, "it would say so"


def test_long_documents_are_cut_or_split(tmp_path: Path, model: UnifiedLM) -> None:
    long = " ".join(f"w{i}" for i in range(120))
    with Index.create(tmp_path / "cut", model) as cut:
        added = cut.add([Document("long", long), "short"])
        assert (added.added, added.cut, added.split) == (2, 1, 0)
        assert cut.get(["long"])[0].text == long
        assert cut.caches(cut.get(["long"]), "bidirectional")[0].token_ids.shape == (model.max_tokens,)
        assert cut.answer("w1 w2", mode="document_then_query", max_new_tokens=1).prompt_tokens < 2 * model.max_tokens + 60
    with Index.create(tmp_path / "split", model, on_long="split") as split:
        added = split.add([Document("long", long, "a.md"), "short"])
        parts = sorted((split.get([id])[0] for id in split._engine.ids() if "#" in id), key=lambda part: int(part.id[5:]))
        assert (added.split, added.added) == (1, len(parts) + 1)
        assert [part.origin for part in parts] == [f"a.md, part {i}" for i in range(1, len(parts) + 1)]
        assert set(" ".join(part.text for part in parts).split()) >= set(long.split()[:5] + long.split()[-5:])
        assert all(one.text[-3:] in two.text for one, two in pairwise(parts)), "parts overlap"


def test_what_cannot_be_opened_says_so(
    index: Index, tmp_path: Path, model: UnifiedLM, other_model: Callable[..., UnifiedLM]
) -> None:
    with pytest.raises(CheckpointError, match="is of another model"):
        Index.open(index.folder, other_model(hidden_size=32, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(CheckpointError, match="does not say where its model is"):
        Index.open(index.folder)
    with pytest.raises(CheckpointError, match="made otherwise: form is float32, asked for int8"):
        Index.create(index.folder, model, states=("bidirectional", "causal"), form="int8")
    with pytest.raises(CheckpointError, match="is no index"):
        Index.open(tmp_path / "nothing", model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        Index.create(tmp_path / "mine", model)
    manifest = index.folder / "index.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**whole, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Index.open(index.folder, model)
    for told, broken in (
        ("not valid JSON", "{"),
        ("got \\[\\]", "[]"),
        ("nested too deeply", "[" * 100_000),
        ("states: got 5", whole | {"states": 5}),
    ):
        manifest.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        with pytest.raises(CheckpointError, match=rf"index\.json.*{told}.*Build the index again"):
            Index.open(index.folder, model)


def test_an_engine_that_cannot_be_opened_leaves_the_place_to_another(
    tmp_path: Path, model: UnifiedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, location: str, dim: int) -> None:
        open_engine("lance", location, dim)
        raise CheckpointError("no room")

    monkeypatch.setattr(module, "open_engine", fails)
    with pytest.raises(CheckpointError, match="no room"):
        Index.create(tmp_path / "index", model)
    monkeypatch.undo()
    with Index.create(tmp_path / "index", model, engine="qdrant") as made:
        assert made.manifest.engine == "qdrant"


def test_what_cannot_be_asked_says_so(index: Index, tmp_path: Path, model: UnifiedLM) -> None:
    with pytest.raises(ConfigError, match=r"unknown mode 'document_cash'\. Did you mean 'document_cache'"):
        index.answer(QUESTION, mode="document_cash")
    with pytest.raises(ConfigError, match="unknown states 'both'"):
        index.answer(QUESTION, states="both")
    with pytest.raises(ConfigError, match="k: got 0"):
        index.answer(QUESTION, k=0)
    with pytest.raises(DataError, match="empty"):
        index.answer("  ")
    with pytest.raises(DataError, match=r"document 'd' \(a\.md\) is empty"):
        index.add([Document("d", " ", "a.md")])
    with Index.create(tmp_path / "empty", model) as empty:
        assert empty.search(QUESTION) == []
        with pytest.raises(DataError, match="has no documents"):
            empty.answer(QUESTION)
        assert empty.answer(QUESTION, mode="no_retrieval", max_new_tokens=2).passages == ()
    with pytest.raises(ConfigError, match="on_long"):
        Index.create(tmp_path / "x", model, on_long="drop")


def read_forty(folder: str, export: str) -> None:
    """An indexer that is killed; it says when the model is loaded."""
    module.CHUNK_TOKENS = 64
    with Index.create(folder, UnifiedLM.from_pretrained(export)) as made:
        print("ready", flush=True)
        made.add(documents(40))


def hold(folder: str) -> None:
    hold_folder(Path(folder))
    print("held", flush=True)
    time.sleep(60)


def content(index: Index) -> dict[str, object]:
    """Everything that an index holds, by bits."""
    ids = sorted(index._engine.ids())
    vectors = {
        p.document.id: p.score for p in index._engine.search(np.eye(index.manifest.dim, dtype=np.float32)[:1], len(ids))[0]
    }
    assert index._store is not None
    caches = {id: index._store.get(id, "bidirectional") for id in ids}
    kept = {
        id: [part.numpy(force=True).tobytes() for layer in c.to(dtype=torch.float32).layers for part in layer]
        for id, c in caches.items()
        if c
    }
    return {"documents": index.get(ids), "vectors": vectors, "caches": kept}


def killed_and_resumed(times: int, tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    """Chunks of 64 tokens; the caller sets them here, and the indexer's own code there."""
    with Index.create(tmp_path / "whole", model) as whole:
        whole.add(documents(40))
        expected = content(whole)
    rng = np.random.default_rng(3)
    for _ in range(times):
        process = Child(read_forty, str(tmp_path / "killed"), str(export))
        assert process.stdout.readline() == "ready\n"
        time.sleep(float(rng.uniform(0.0, 0.3)))
        process.kill()
    with Index.create(tmp_path / "killed", model) as resumed:
        resumed.add(documents(40))
        found = content(resumed)
        assert len(resumed) == 40
        assert found == expected


def test_killed_and_started_again_it_is_the_same_index(
    tmp_path: Path, export: Path, model: UnifiedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 64)
    killed_and_resumed(1, tmp_path, export, model)


@pytest.mark.slow
def test_killed_twenty_times_it_is_the_same_index(
    tmp_path: Path, export: Path, model: UnifiedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 64)
    killed_and_resumed(20, tmp_path, export, model)


def resident_bytes() -> int:
    """Memory of this process that no other shares."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["document_cache", "query_document_cache", "document_then_query"])
def test_memory_is_flat_over_a_thousand_answers(mode: str, tmp_path: Path, model: UnifiedLM) -> None:
    """Each from a document of its own."""
    texts = [Document(f"d{i}", " ".join(str(i * 7919 * k % 9973) for k in range(1, 31))) for i in range(1000)]
    with Index.create(tmp_path / "index", model, form="float32", max_tokens=512) as made:
        made.add(texts)
        used, seen = [], set()
        for number, document in enumerate(texts):
            answer = made.answer(document.text, mode=mode, instruction="", max_new_tokens=1)
            seen.add(answer.passages[0].document.id)
            if number % 100 == 99:
                gc.collect()
                used.append(resident_bytes())
        stored = made.num_bytes
    print(f"{stored / 1e6:.0f} MB of keys and values; in memory", [f"{value / 1e6:.1f} MB" for value in used])
    assert len(seen) > 950
    assert stored > 50e6
    assert used[-1] - used[1] < 10e6


@pytest.mark.slow
def test_five_thousand_documents_answer_the_same_after_a_restart(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    source = open_source(SourceConfig(builtin="pydocs", split="train", limit=5000), RecordKind.PAIR, seed=0)
    rows = [record for record in source if isinstance(record, PairRecord)]
    assert len(rows) == 5000
    texts = [Document(f"{number}", row.positives[0].text) for number, row in enumerate(rows)]
    asked = [(row.query.text[:30], mode) for row in rows[::250] for mode in ("document_cache", "query_document_cache")]
    folder = tmp_path / "index"
    with Index.create(folder, model, name=str(export), form="int8", max_tokens=128) as made:
        assert made.add(texts).added == 5000
        before = [made.answer(question, mode=mode, max_new_tokens=4) for question, mode in asked]
    with Index.open(folder) as opened:  # another model object, from the name in the index
        assert len(opened) == 5000
        assert opened.add(texts).unchanged == 5000
        after = [opened.answer(question, mode=mode, max_new_tokens=4) for question, mode in asked]
    for one, other in zip(before, after, strict=True):
        assert (one.text, one.passages, one.cached_tokens) == (other.text, other.passages, other.cached_tokens)


def test_two_writers_are_refused(tmp_path: Path, export: Path, model: UnifiedLM) -> None:
    with Index.create(tmp_path / "index", model) as made:
        made.add(TEXTS[:4])
        holder = Child(hold, str(tmp_path / "index"))
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match="in use by another process"):
                made.add(TEXTS)
            assert made.answer(QUESTION, max_new_tokens=2).mode == "document_cache", "others may read meanwhile"
        finally:
            holder.kill()
        assert made.add(TEXTS).added == 8, "the chunk has new documents, so it is read as a whole"
