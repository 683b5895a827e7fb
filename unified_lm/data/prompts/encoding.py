"""Token-level prompts: ids with exact boundaries between prompt, text and answer.

The ids equal those of the stock tokenizer on the whole string (sentence-transformers concatenates prompt and text before it
tokenizes), with one deliberate exception: a special token spelled out *inside* a user's text ("<|im_end|>", "</s>") stays
ordinary text, so that data can neither end a turn nor fake one. Stock tools parse it at inference; `PromptEncoder` never does.
A template's end token follows where the tokenizer adds none; an export has the tokenizer add it (`export.tokenizer_files`).

Method: the special tokens of a template are atoms. Each stretch of text between them is tokenized as a whole, in the way the
tokenizer reads text after a special token, and boundaries inside a stretch are derived from the token offsets. A text whose
boundary falls inside a token is rejected, never shifted, unless the template says how it is read (`Template.joined`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.prompts.encoded import Encoded, Fragment, Rejection, assemble, truncate_chat
from unified_lm.data.prompts.plain_tokenizers import plain_tokenizers
from unified_lm.data.prompts.surrounded import SurroundedPrompt, encode_surrounded
from unified_lm.data.prompts.templates import Template, added_ids, special_tokens

__all__ = ["Encoded", "PromptEncoder", "Rejection"]

_PROBE_INSTRUCTION = "Find the passage, please: 'x'"
_PROBE_TEXTS = ("What is it?", "the (second) text 12", "Zwölf – 十二", "_x")


class PromptEncoder:
    """A template bound to a tokenizer.

    Args:
        template: the prompt template.
        tokenizer: a fast tokenizer. It is copied, never changed.

    Attributes:
        appended_end: id of the template's end token after every embedded text; None where the tokenizer adds an end itself, or
            the template has none.

    Raises:
        ConfigError: the tokenizer is not a fast one, or tokenizes this template differently (the message shows where).
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer (no tokenizer.json); convert it first")
        self.template = template
        self.tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        # Longest first: a special token may be a prefix of another. Without any, (?!) matches nothing.
        self._splitter = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r"(?!)")
        description = tokenizer.backend_tokenizer.to_str()
        self.fingerprint = blake2b(description.encode(), digest_size=16).hexdigest()
        self._at_start, self._after_special = plain_tokenizers(description)
        self._leading, self._trailing = added_ids(tokenizer)
        self.appended_end = None if self._trailing else self._end_id()
        if self.appended_end is not None:
            self._trailing = [self.appended_end]
        # Few distinct instructions precede many texts.
        self._prompt = lru_cache(maxsize=4096)(self._prompt_parts)
        self._check_end()
        self._verify()

    def embed(self, texts: Sequence[tuple[str, str]], limit: int) -> list[Encoded | Rejection]:
        """Encode texts to embed.

        Args:
            texts: (text, instruction) pairs; both are stripped.
            limit: maximum number of tokens of prompt and text together. Only the text is truncated.

        Returns:
            Per text, its tokens or the reason for rejection. The span is exactly what sentence-transformers pools after the
            prompt (all tokens if the prompt is empty); under an echo template, the second copy.

        Raises:
            DataError: an instruction leaves no room for any text.
        """
        if self.template.surrounds:
            return [self._embed_surrounded(text.strip(), instruction.strip(), limit) for text, instruction in texts]
        prompts = [self._prompt(instruction.strip()) for _, instruction in texts]
        for (_, instruction), prompt in zip(texts, prompts, strict=True):
            if len(prompt.ids) + len(self._trailing) >= limit:
                raise DataError(
                    f"the instruction {instruction.strip()[:80]!r} takes {len(prompt.ids)} tokens with its template "
                    f"'{self.template.name}' and leaves no room for text under the limit of {limit}. "
                    "Shorten it, or raise the limit."
                )
        strings = [prompt.tail + text.strip() for (text, _), prompt in zip(texts, prompts, strict=True)]
        encodings = self._encode(strings, [prompt.after_special for prompt in prompts])
        return [
            Rejection.EMPTY if not text.strip() else self._finish_embedding(prompt, encoding, limit)
            for (text, _), prompt, encoding in zip(texts, prompts, encodings, strict=True)
        ]

    def chat(
        self,
        conversations: Sequence[Sequence[tuple[str, str]]],
        limit: int,
        unlearned: Sequence[Collection[int]] | None = None,
        *,
        continued: bool = False,
    ) -> list[Encoded | Rejection]:
        """Encode conversations of (role, content) turns.

        Args:
            conversations: their turns; contents are stripped.
            limit: maximum number of tokens. An answer that crosses it is cut there, without its end token; later turns are
                dropped.
            unlearned: per conversation the turns that are read but not learned, answers though they are; None: none.
            continued: whether other tokens of the prompt come before: no BOS token, and a separator before the first turn.

        Returns:
            Per conversation, its tokens with one span per learned answer (text and end token), or the reason for rejection.
        """
        self.template.require_chat()
        passed = [()] * len(conversations) if unlearned is None else unlearned
        fragments = [self._fragments(turns, skipped, continued) for turns, skipped in zip(conversations, passed, strict=True)]
        return [truncate_chat(encoded, limit) for encoded in self._encode_fragments(fragments, continued)]

    def generation_prompt(self, turns: Sequence[tuple[str, str]], *, continued: bool = False) -> np.ndarray:
        """The prompt ids, int32 `[T]`, after which a model generates its answer to `turns`; `continued` as in `chat`."""
        self.template.require_chat()
        opening = self.template.separator + self.template.turns["assistant"].opening
        fragments = [*self._fragments(turns, (), continued), Fragment(opening, template=True)]
        (encoded,) = self._encode_fragments([fragments], continued)
        assert isinstance(encoded, Encoded)
        return encoded.ids

    def running_text(self, texts: Sequence[str], *, continued: bool = False) -> list[np.ndarray]:
        """The ids of each text, int32, without BOS or EOS token.

        Args:
            texts: the texts, which are not stripped.
            continued: whether the texts continue others, so that a Llama-like tokenizer adds no leading space.
        """
        return [np.asarray(e.ids, dtype=np.int32) for e in self._encode(list(texts), [continued] * len(texts))]

    @property
    def leading_ids(self) -> list[int]:
        """The ids before running text: the BOS token, if the tokenizer adds it or the template requires it."""
        bos = self.tokenizer.bos_token_id
        return list(self._leading) or ([bos] if self.template.literal_bos and bos is not None else [])

    @property
    def ends_texts(self) -> bool:
        """Whether the last pooled token is the same for every text, also a truncated one: what last-token pooling needs."""
        if self.template.surrounds:  # a tokenizer's own end stands after what is pooled
            return bool(self.template.suffix or self.template.embedding_end)
        return bool(self._trailing)

    @property
    def special_ids(self) -> list[int]:
        """The ids of all special tokens, ascending."""
        return sorted({*self._special.values(), *self.tokenizer.all_special_ids})

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def _prompt_parts(self, instruction: str) -> _Prompt:
        bos = self.template.embedding_prompt(self.tokenizer, instruction)
        body = self.template.body(instruction)
        bos = bos[: len(bos) - len(body)]
        # The instruction is a fragment of its own, so that a special token spelled out in it stays text.
        before, marker, after = self.template.instruction_prompt.partition("{instruction}") if instruction else ("", "", body)
        fragments = [Fragment(bos + before, template=True), Fragment(instruction if marker else "", template=False)]
        fragments.append(Fragment(after, template=True))
        # Everything up to the last special token is the same for every text. The tail is tokenized again with every
        # text, since its last characters and the first ones of the text may merge into one token.
        atoms = self._atoms(fragments)
        tail = "".join(text for text, _ in atoms[-1])
        head_atoms: list[Any] = atoms[:-1]
        head = list(self._leading)
        strings = [(index, "".join(t for t, _ in atom)) for index, atom in enumerate(head_atoms) if isinstance(atom, list)]
        encoded = dict(
            zip([i for i, _ in strings], self._encode([s for _, s in strings], [i > 0 for i, _ in strings]), strict=True)
        )
        for index, atom in enumerate(head_atoms):
            head.extend(encoded[index].ids if isinstance(atom, list) else [atom[0]])
        after_special = len(atoms) > 1
        tail_ids = self._encode([tail], [after_special])[0].ids if tail else []
        return _Prompt(tuple(head), tail, tuple(tail_ids), after_special, self._pool_start(head + tail_ids, bos + body))

    def _embed_surrounded(self, text: str, instruction: str, limit: int) -> Encoded | Rejection:
        if not text:
            return Rejection.EMPTY
        text = self.template.cleaned(text)
        around = len(self._leading) + len(self._trailing)
        prompt = self._surrounded(instruction)
        tokens = encode_surrounded(prompt, text, limit - around, lambda s: self._encode(s, [False] * len(s)))
        if tokens.start is None:
            return Rejection.STRADDLES
        ids = np.asarray([*self._leading, *tokens.ids, *self._trailing], dtype=np.int32)
        first = len(self._leading)
        end = len(ids) if self.template.embedding_end else first + len(tokens.ids)
        return Encoded(ids, ((first + tokens.start, end),), tokens.truncated)

    def _surrounded(self, instruction: str) -> SurroundedPrompt:
        template = self.template
        after = template.suffix or (template.instruction_echo if instruction else template.bare_echo)
        return SurroundedPrompt(template.body(instruction), after, repeats=not template.suffix)

    def _pool_start(self, prompt_ids: list[int], prompt: str) -> int:
        """Number of tokens that sentence-transformers excludes from pooling (its `_get_prompt_length`)."""
        if not prompt or self.template.pools_prompt:
            return 0
        # It tokenizes the prompt alone and drops a trailing special token, which it takes for the tokenizer's own EOS.
        alone = [*prompt_ids, *self._trailing]
        return len(alone) - (alone[-1] in (self.appended_end, *self.tokenizer.all_special_ids))

    def _finish_embedding(self, prompt: _Prompt, encoding: Encoding, limit: int) -> Encoded | Rejection:
        ids, width = encoding.ids, len(prompt.tail_ids)
        room = limit - len(prompt.head) - len(self._trailing)
        full = [*prompt.head, *ids[:room], *self._trailing]
        # Equal ids mean that the boundary between prompt and text is a token boundary.
        at_border = tuple(ids[:width]) == prompt.tail_ids and len(ids) > width
        if not at_border and not (self.template.joined and prompt.pool_start < len(full)):
            return Rejection.STRADDLES
        return Encoded(np.asarray(full, dtype=np.int32), ((prompt.pool_start, len(full)),), len(ids) > room)

    # -- conversations ------------------------------------------------------------------------------------------------

    def _fragments(
        self, turns: Sequence[tuple[str, str]], unlearned: Collection[int] = (), continued: bool = False
    ) -> list[Fragment]:
        fragments = [Fragment("" if continued else self.template.chat_bos(self.tokenizer), template=True)]
        for index, (role, content) in enumerate(turns):
            opening = self.template.separator * (continued or index > 0) + self.template.turns[role].opening
            answer = role == "assistant" and index not in unlearned
            fragments.append(Fragment(opening, template=True))
            fragments.append(Fragment(content.strip(), template=False, answer=answer))
            fragments.append(Fragment(self.template.closing(role, self.tokenizer), template=True, answer=answer))
        return fragments

    def _encode_fragments(
        self, conversations: Sequence[Sequence[Fragment]], continued: bool = False
    ) -> list[Encoded | Rejection]:
        atoms = [self._atoms(fragments) for fragments in conversations]
        stretches = [
            (c, index, atom) for c, row in enumerate(atoms) for index, atom in enumerate(row) if isinstance(atom, list)
        ]
        # All stretches of all conversations go through one call, which the tokenizer runs in parallel.
        strings = ["".join(text for text, _ in atom) for _, _, atom in stretches]
        encodings = self._encode(strings, [continued or index > 0 for _, index, _ in stretches])
        by_index = {(c, index): encoding for (c, index, _), encoding in zip(stretches, encodings, strict=True)}
        return [assemble(row, lambda index, c=c: by_index[c, index]) for c, row in enumerate(atoms)]  # type: ignore[misc]

    def _atoms(self, fragments: Sequence[Fragment]) -> list[Any]:
        """Split fragments into special tokens `(id, answer)` and the stretches between them, lists of `(text, answer)`.

        The first and the last atom are always stretches, possibly empty.
        """
        atoms: list[Any] = [[]]
        for fragment in fragments:
            if not fragment.template:
                atoms[-1].append((fragment.text, fragment.answer))
                continue
            start = 0
            for match in self._splitter.finditer(fragment.text):
                atoms[-1].append((fragment.text[start : match.start()], fragment.answer))
                atoms += [(self._special[match.group()], fragment.answer), []]
                start = match.end()
            atoms[-1].append((fragment.text[start:], fragment.answer))
        return atoms

    # -- tokenizer ----------------------------------------------------------------------------------------------------

    def _encode(self, strings: Sequence[str], after_special: Sequence[bool]) -> list[Encoding]:
        """Tokenize stretches, each as text at the start of a string or as text after a special token."""
        if self._after_special is self._at_start:
            return self._at_start.encode_batch(list(strings), add_special_tokens=False)
        parts: dict[int, Encoding] = {}
        for flag, tokenizer in ((False, self._at_start), (True, self._after_special)):
            chosen = [i for i, value in enumerate(after_special) if value == flag]
            encoded = tokenizer.encode_batch([strings[i] for i in chosen], add_special_tokens=False)
            parts.update(zip(chosen, encoded, strict=True))
        return [parts[i] for i in range(len(strings))]

    def _end_id(self) -> int | None:
        end = self.template.end_token(self.tokenizer)
        if end and end not in self._special:
            raise ConfigError(
                f"template '{self.template.name}' ends embedded texts with {end!r}, which is not a special token of the "
                f"tokenizer ({', '.join(sorted(self._special)) or 'it has none'}). Choose a template that ends them with one "
                "of these, or NAME+eos, which takes the tokenizer's end-of-text token."
            )
        return self._special[end] if end else None

    def _check_end(self) -> None:
        """Refuse a template whose answers end without a special token, since generation would then never stop."""
        if not self.template.turns:
            return
        closing = self.template.closing("assistant", self.tokenizer)
        if not self._splitter.search(closing):
            raise ConfigError(
                f"template '{self.template.name}' ends an answer with {closing!r}, which is not a special token of the "
                f"tokenizer ({', '.join(sorted(self._special)) or 'it has none'}). Choose one that it knows, such as 'grit'."
            )

    def _verify(self) -> None:
        """Compare with the stock tokenizer on whole strings once, so that nothing is trained on a wrong prompt."""
        for instruction in ("", _PROBE_INSTRUCTION):
            for text, ours in zip(_PROBE_TEXTS, self.embed([(t, instruction) for t in _PROBE_TEXTS], 10_000), strict=True):
                string = self._whole(text, instruction)
                end = [] if self.appended_end is None else [self.appended_end]
                self._compare(string, ours, [*self.tokenizer(string)["input_ids"], *end])
        if self.template.turns:
            turns = [("user", _PROBE_TEXTS[0]), ("assistant", _PROBE_TEXTS[1])] * 2
            string = "".join(fragment.text for fragment in self._fragments(turns))
            stock = self.tokenizer(string, add_special_tokens=False)["input_ids"]
            self._compare(string, self.chat([turns], 10_000)[0], stock)

    def _whole(self, text: str, instruction: str) -> str:
        """The complete string that is tokenized to embed a text."""
        if self.template.surrounds:
            return self._surrounded(instruction).string(self.template.cleaned(text))
        return self.template.embedding_prompt(self.tokenizer, instruction) + text

    def _compare(self, string: str, ours: Encoded | Rejection, stock: list[int]) -> None:
        if isinstance(ours, Rejection) or ours.ids.tolist() != list(stock):
            reason = ours.value if isinstance(ours, Rejection) else "the ids differ from those of the whole string"
            raise ConfigError(
                f"template '{self.template.name}' does not fit this tokenizer ({type(self.tokenizer).__name__}) on "
                f"{string!r}: {reason}. A special token that swallows white space does this, or one that the template names "
                "and the tokenizer lacks; choose another template."
            )


@dataclass(frozen=True)
class _Prompt:
    """An embedding prompt: ids up to its last special token, the text after it, and the ids of that text alone."""

    head: tuple[int, ...]
    tail: str
    tail_ids: tuple[int, ...]
    after_special: bool
    pool_start: int

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the complete prompt."""
        return self.head + self.tail_ids
