"""Fast tokenizers of every kind that matters here, made in code: byte-level and sentencepiece-like, with and without a bos."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unified_lm.models.tiny import tiny_tokenizer

_CORPUS = [
    "<|user|>\nWhat does the sum of two numbers mean?\n<|assistant|>\nThe sum is the result. hello world\n<|embed|>\n",
    "Retrieve the documents for this query; a b c, that the assistant answers.",
] * 10


def metaspace(scheme: str = "first") -> PreTrainedTokenizerFast:
    """Like Llama's and Mistral's: Metaspace over the whole string, byte fallback, a bos added by itself."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return _with_bos(backend)


def legacy_metaspace() -> PreTrainedTokenizerFast:
    """Like old Llama tokenizers: the space mark is put in front by a normalizer, no pre-tokenizer."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _with_bos(backend)


def _with_bos(backend: Tokenizer) -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<s>", "</s>"]
    # Texts of one line: a real sentencepiece model has no token that joins a line end to a word either.
    corpus = [line for text in _CORPUS for line in text.splitlines()]
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    description = json.loads(backend.to_str())
    vocabulary = description["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    backend = Tokenizer.from_str(json.dumps(description))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def chat_byte_level(bos: bool = True, eos_appended: bool = False) -> PreTrainedTokenizerFast:
    """Like SmolLM2-Instruct's: byte level, "<|im_start|>" as a bos that is not added by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    if eos_appended:
        backend.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    names = {"bos_token": "<|im_start|>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", **names)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level, bos added": tiny_tokenizer,
    "byte level, bos not added": lambda: tiny_tokenizer(add_bos=False),
    "byte level, chat tokens": chat_byte_level,
    "byte level, no bos": lambda: chat_byte_level(bos=False),
    "byte level, eos appended": lambda: chat_byte_level(eos_appended=True),
    "metaspace, first word": metaspace,
    "metaspace, every stretch": lambda: metaspace("always"),
    "metaspace, legacy": legacy_metaspace,
}
