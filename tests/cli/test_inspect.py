"""`inspect` shows every stream with its parts in their colors, counts, packing, and a picture of the mask."""

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from unified_lm.batch import IGNORE, Sample, make_pack
from unified_lm.cli.inspect import Part, colored, parts, run_inspect
from unified_lm.cli.mask_picture import mask_image
from unified_lm.config.schema import (
    ModelConfig,
    PackingConfig,
    RunConfig,
    SourceConfig,
)
from unified_lm.data.formats import ChatStream, MaskedTextStream, MaskingConfig, PairsStream, TextStream
from unified_lm.models.tiny import tiny_tokenizer
from unified_lm.objectives import ContrastiveConfig, NextTokenConfig

TOKENIZER = tiny_tokenizer()


def write(path: Path, rows: list[dict]) -> tuple[SourceConfig, ...]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (SourceConfig(path=str(path)),)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    pairs = write(
        tmp_path / "pairs.jsonl", [{"query": ["Find", f"where {i}"], "pos": [["", f"there {i}"]], "neg": []} for i in range(9)]
    )
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    chats = write(tmp_path / "chats.jsonl", [{"messages": turns}] * 5)
    texts = write(tmp_path / "texts.jsonl", [{"text": f"a sentence about number {i}"} for i in range(9)])
    token, contrastive = NextTokenConfig(), ContrastiveConfig()
    streams = {
        "emb": PairsStream(sources=pairs, attention="bidirectional", batch_size=4, objective=contrastive),
        "gen": ChatStream(sources=chats, attention="bidirectional_prompt", batch_size=2, objective=token),
        "lm": TextStream(sources=texts, batch_size=2, template="plain", objective=token),
        "mntp": MaskedTextStream(
            sources=texts, attention="bidirectional", batch_size=2, template="plain",
            masking=MaskingConfig(scheme="all_mask", probability=0.3), objective=token, max_tokens=20,
        ),
    }  # fmt: skip
    return RunConfig(recipe="test", model=ModelConfig(), streams=streams, packing=PackingConfig(token_budget=512))


def test_everything_is_shown_and_the_picture_is_written(config, tmp_path):
    screen = io.StringIO()
    path = run_inspect(config, TOKENIZER, Console(file=screen, width=160), tmp_path / "out")
    text = screen.getvalue()
    for expected in (
        "emb: pairs",
        "gen: chat",
        "mntp: masked_text",
        "<|embed|>",
        "because</s>",
        "where",
        "there",
        "pooled (",
        "_→",
    ):
        assert expected in text, expected
    for expected in ("bidirectional in (0, ", "samples per step", "14.0", "fill", "padded instead", "truncated samples"):
        assert expected in text, expected
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 500
    colors = {tuple(c) for c in (image[::4, ::4, :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(0x3B, 0x6F, 0xB6), (0xE0, 0x8A, 0x2E), (0x3A, 0x9A, 0x5B)} <= colors, "all three modes are drawn"


def test_styles_reach_the_terminal(config, tmp_path):
    screen = io.StringIO()
    run_inspect(config, TOKENIZER, Console(file=screen, width=160, force_terminal=True), tmp_path)
    assert "\x1b[32mwhere" in screen.getvalue(), "pooled text is green"
    assert "\x1b[1;33mbecause" in screen.getvalue(), "learned text is yellow"


def test_parts_of_every_kind_of_sample():
    ids = np.array([1, 70, 71, 72])
    assert parts(Sample(input_ids=ids, stream="s", pool=(2, 4))) == [Part.PROMPT, Part.PROMPT, Part.POOLED, Part.POOLED]
    learned = Sample(input_ids=ids, stream="s", labels=np.array([IGNORE, IGNORE, 71, 72]))
    assert parts(learned) == [Part.PROMPT, Part.PROMPT, Part.LEARNED, Part.LEARNED]
    masked = Sample(input_ids=ids, stream="s", labels=np.array([IGNORE, 90, 71, IGNORE]))
    assert parts(masked) == [Part.PROMPT, Part.HIDDEN, Part.KEPT, Part.PROMPT]


def test_the_text_shown_is_the_text_read():
    ids = np.array(TOKENIZER("Zwölf 十二\nab")["input_ids"])
    assert colored(Sample(input_ids=ids, stream="s", pool=(1, len(ids))), TOKENIZER).plain == "<s>Zwölf 十二↵\nab"


def test_long_samples_are_cut_on_screen_and_say_so():
    ids = np.full(400, 80)
    assert "240 more tokens" in colored(Sample(input_ids=ids, stream="s"), TOKENIZER).plain


def test_the_picture_has_the_plans_mask():
    pack = make_pack(
        [Sample(input_ids=np.arange(4), stream="s", bidirectional=(0, 4)), Sample(input_ids=np.arange(3), stream="s")]
    )
    image = mask_image(pack)
    assert ((image > 0) == pack.plan.dense_mask().numpy()).all()
    assert set(np.unique(image[:3, :3])) == {0, 1}
    assert set(np.unique(image[3:, 3:])) == {3}
