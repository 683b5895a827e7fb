"""Prompt templates: the text around an embedded text, and the format of the turns of a conversation.

A template is data. Its markers ("<|user|>", "<|embed|>") are ordinary text, never added tokens; only strings that a tokenizer
already has as special tokens (its BOS and EOS tokens, chatml's "<|im_start|>") become special ones. The same template yields
the ids for training (`data.prompts.encoding`), the prompt string for sentence-transformers and the Jinja chat template for
transformers, so an export behaves as trained.

Embedding prompts end in a newline where they can: sentence-transformers measures a prompt by tokenizing it alone, which is
correct only if no token straddles its end, and it subtracts one token if the last token of the prompt is special. Published
embedders have prompts that end in a space, which merges with the first word of a text; those are `joined`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from transformers import PreTrainedTokenizerBase

from unified_lm.core.errors import ConfigError
from unified_lm.core.tables import resolve


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Format of a role's turn: `opening`, the stripped content, `closing` ("{eos}" stands for the tokenizer's EOS token)."""

    opening: str
    closing: str = ""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How texts become prompts.

    Attributes:
        name: its name.
        instruction_prompt: prefix of an embedded text with an instruction; "{instruction}" stands for the instruction.
        bare_prompt: prefix of an embedded text without an instruction.
        turns: role ("system", "user", "assistant") -> format of its turns; empty for a template without conversations. The
            closing of the assistant is what the model learns to stop with.
        separator: text between two turns.
        literal_bos: whether to write out the BOS token for a tokenizer that has one without adding it. For a tokenizer that
            adds it (Llama, Mistral) it is always present.
        bare_echo: text between the two copies of an embedded text without an instruction (`data.prompts.surrounded`).
        instruction_echo: the same for a text with one.
        suffix: text after every embedded text, which is pooled with it: its last token is what `last_token` takes. A text that
            is too long is cut before it.
        quoted: whether the text stands in double quotes: it is ended with a full stop if it ends with no mark, its own double
            quotes become single ones, and underscores spaces, as MOEE's published prompts have it.
        embedding_end: special token that ends every embedded text, also a truncated one, and is pooled; "{eos}" stands for the
            tokenizer's EOS token. It is for tokenizers that add no end: where one adds its own, that one stays the only one.
            It excludes a suffix.
        joined: whether one token may hold the last characters of the prompt and the first of the text; else such texts are
            refused. The ids are those of the whole string in either case. The pooled span then begins where it does in
            sentence-transformers: after as many tokens as the prompt alone has, so that a token across the border belongs
            to the prompt if it takes the place of the prompt's last token, and to the text otherwise.
        pools_prompt: whether the prompt is pooled with the text: the span is the whole sample.
    """

    name: str
    instruction_prompt: str
    bare_prompt: str = ""
    turns: Mapping[str, Turn] = field(default_factory=dict)
    separator: str = "\n"
    literal_bos: bool = False
    bare_echo: str = ""
    instruction_echo: str = ""
    suffix: str = ""
    quoted: bool = False
    embedding_end: str = ""
    joined: bool = False
    pools_prompt: bool = False

    @property
    def signature(self) -> str:
        """Content of the template, for hashes. Fields added after the first checkpoints are included only if set."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        said = [f"{name}={value!r}" for name, value in values.items() if value or name not in _YOUNGER_FIELDS]
        return f"{type(self).__qualname__}({', '.join(said)})"

    @property
    def surrounds(self) -> bool:
        """Whether the prompt goes on after an embedded text."""
        return bool(self.suffix or self.bare_echo or self.instruction_echo)

    def cleaned(self, text: str) -> str:
        """A text, not empty, as it stands in the prompt."""
        if not self.quoted:
            return text
        return (text if text[-1] in ".?!\"'" else f"{text}.").replace('"', "'").replace("_", " ")

    def embedding_prompt(self, tokenizer: PreTrainedTokenizerBase, instruction: str = "") -> str:
        """The string before a text to embed, in the form that sentence-transformers needs.

        The BOS token is written out only if the template requires it and the tokenizer has it but does not add it.

        Args:
            tokenizer: the tokenizer that will read prompt + text as one string.
            instruction: the task, "" for none. Surrounding white space is removed.

        Raises:
            ConfigError: the template goes on after the text, which no prefix can express.
        """
        if self.surrounds:
            raise ConfigError(
                f"template '{self.name}' goes on after every text (echo embeddings, a suffix); stock tools only put a prompt "
                "before it. Use it with UnifiedLM, or choose another template."
            )
        bos = "" if adds_bos(tokenizer) or not self.literal_bos else tokenizer.bos_token or ""
        return bos + self.body(instruction)

    def body(self, instruction: str) -> str:
        """The embedding prompt without its BOS token."""
        instruction = instruction.strip()
        return self.instruction_prompt.replace("{instruction}", instruction) if instruction else self.bare_prompt

    def chat_bos(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The BOS token of a conversation ("" for none), since chat templates are tokenized without added special tokens."""
        return (tokenizer.bos_token or "") if self.literal_bos or adds_bos(tokenizer) else ""

    def closing(self, role: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The end of a turn of `role`, with the tokenizer's own EOS token.

        Raises:
            ConfigError: the template ends turns with the EOS token and the tokenizer has none.
        """
        return self._with_eos(self.turns[role].closing, tokenizer, "an answer")

    def end_token(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The token that ends an embedded text, "" for none, with the tokenizer's own EOS token.

        Raises:
            ConfigError: the template ends texts with the EOS token and the tokenizer has none.
        """
        return self._with_eos(self.embedding_end, tokenizer, "an embedded text")

    def _with_eos(self, text: str, tokenizer: PreTrainedTokenizerBase, ended: str) -> str:
        if "{eos}" in text and not tokenizer.eos_token:
            raise ConfigError(
                f"template '{self.name}' ends {ended} with the tokenizer's end-of-text token, but the tokenizer has none. "
                "Set tokenizer.eos_token, or choose a template that names its own."
            )
        return text.replace("{eos}", tokenizer.eos_token or "")

    def require_chat(self) -> None:
        """Raise ConfigError if the template has no form for conversations."""
        if not self.turns:
            chatty = sorted(name for name, template in TEMPLATES.items() if template.turns)
            raise ConfigError(f"template '{self.name}' cannot write conversations; those that can: {', '.join(chatty)}")

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The Jinja chat template for `tokenizer.chat_template`.

        Rendering a conversation with it and tokenizing the result yields the ids used in training, except that special tokens
        spelled out inside a message are parsed as such (training reads them as ordinary text).

        Raises:
            ConfigError: the template has no form for conversations.
        """
        self.require_chat()
        branches: list[str] = []
        for role, turn in self.turns.items():
            word = "elif" if branches else "if"
            content = f"{_quote(turn.opening)} + message['content'] | trim + {_quote(self.closing(role, tokenizer))}"
            branches.append(f"{{% {word} message['role'] == {_quote(role)} %}}{{{{ {content} }}}}")
        refuse = "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
        answer = _quote(self.separator + self.turns["assistant"].opening)
        bos = self.chat_bos(tokenizer)
        return (
            (f"{{{{ {_quote(bos)} }}}}" if bos else "")
            + "{% for message in messages %}"
            + f"{{% if not loop.first %}}{{{{ {_quote(self.separator)} }}}}{{% endif %}}"
            + "".join(branches)
            + refuse
            + f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
        )


_YOUNGER_FIELDS = ("bare_echo", "instruction_echo", "suffix", "quoted", "embedding_end", "joined", "pools_prompt")


def _quote(text: str) -> str:
    """Quote a text as a Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after every text (BOS and EOS tokens)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start]), list(full[start + len(bare) :])
    raise ConfigError(f"the tokenizer {type(tokenizer).__name__} changes a text when it adds special tokens; it cannot be used")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds its BOS token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in added_ids(tokenizer)[0]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token of a tokenizer, with its id."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def template_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens of a tokenizer that a template writes out, with their ids; those that it adds by itself are none."""
    strings = [template.instruction_prompt, template.bare_prompt, template.separator, template.end_token(tokenizer)]
    strings += [turn.opening + template.closing(role, tokenizer) for role, turn in template.turns.items()]
    strings.append((tokenizer.bos_token or "") if template.literal_bos else "")
    return {text: index for text, index in special_tokens(tokenizer).items() if any(text in string for string in strings)}


QUOTED: dict[str, tuple[str, str]] = {
    "quoted": ("", ""),
    "prompt_eol": ("This sentence : ", ' means in one word:"'),
    "moee_style": ("In one word, describe the style of the following sentence - ", ' :"'),
    "moee_sentiment": (
        "In one word, describe the sentiment of the following sentence (positive, neutral, or negative) - ",
        " :",
    ),
    "moee_tone": (
        "In one word, describe the tone of the following sentence - ",
        " (e.g., formal, informal, humorous, serious):",
    ),
    "moee_intent": (
        "In one word, describe the intent behind the following sentence (e.g., request, suggestion, command) - ",
        " :",
    ),
    "moee_complexity": ("In one word, rate the complexity of the following sentence (simple, moderate, complex) - ", " :"),
    "moee_subjectivity": ("In one word, describe whether the following sentence is subjective or objective - ", " :"),
    "moee_language_style": (
        "In one word, describe the language style of the following sentence (e.g., academic, conversational, literary) - ",
        " :",
    ),
    "moee_grammar_structure": (
        "In one word, describe the grammatical structure of the following sentence (simple, compound, complex) - ",
        " :",
    ),
}
"""The prompts of MOEE: name -> what stands before and after a quoted text. "quoted" is what its code calls none."""


def _quoted(name: str, before: str, after: str) -> Template:
    before, after = f'{before}"', f'"{after}'
    return Template(
        name=name, instruction_prompt=f"{{instruction}}\n{before}", bare_prompt=before, suffix=after, quoted=True, joined=True
    )


TEMPLATES: dict[str, Template] = {
    "grit": Template(
        name="grit",
        instruction_prompt="<|user|>\n{instruction}\n<|embed|>\n",
        bare_prompt="<|embed|>\n",
        turns={
            "system": Turn(opening="<|system|>\n"),
            "user": Turn(opening="<|user|>\n"),
            "assistant": Turn(opening="<|assistant|>\n", closing="{eos}"),
        },
        literal_bos=True,
    ),
    "chatml": Template(
        name="chatml",
        instruction_prompt="<|im_start|>user\n{instruction}\n",
        bare_prompt="<|im_start|>user\n",
        turns={
            "system": Turn(opening="<|im_start|>system\n", closing="<|im_end|>"),
            "user": Turn(opening="<|im_start|>user\n", closing="<|im_end|>"),
            "assistant": Turn(opening="<|im_start|>assistant\n", closing="<|im_end|>"),
        },
    ),
    "plain": Template(name="plain", instruction_prompt="{instruction}\n"),
    "plain_bos": Template(name="plain_bos", instruction_prompt="{instruction}\n", bare_prompt="\n", literal_bos=True),
    "llm2vec": Template(name="llm2vec", instruction_prompt="{instruction};\n"),
    "echo": Template(
        name="echo",
        instruction_prompt="Instruct: {instruction}\nQuery: ",
        instruction_echo="\nQuery again: ",
        bare_prompt="Rewrite the sentence: ",
        bare_echo=", rewritten sentence: ",
    ),
    **{name: _quoted(name, before, after) for name, (before, after) in QUOTED.items()},
    "e5_instruct": Template(
        name="e5_instruct",
        instruction_prompt="Instruct: {instruction}\nQuery: ",
        embedding_end="{eos}",
        joined=True,
        pools_prompt=True,
    ),
    "qwen3_embedding": Template(
        name="qwen3_embedding",
        instruction_prompt="Instruct: {instruction}\nQuery:",
        embedding_end="<|endoftext|>",
        joined=True,
        pools_prompt=True,
    ),
}
"""Templates by name.

- grit: GritLM's format (paper, figure 3). The system turn follows the Tulu format, from which its markers are taken.
- chatml: SmolLM2-Instruct's and Qwen's own conversation format, without their default system message.
- plain: the text alone, as the tokenizer encodes it (with a BOS token only if the tokenizer adds one); an instruction is on
  its own line. For MNTP, SimCSE and running text.
- plain_bos: plain with a BOS token, for tokenizers that have one without adding it, such as SmolLM2's. The tokenizers of
  LLM2Vec's own families add theirs; bidirectional training works better with it (docs/log.md).
- llm2vec: "instruction;" before the text. The reference trains on "{instruction}; {text}" and infers with
  "{instruction}: {text}"; here both are the same, and a newline in place of the space makes the end of the prompt a token
  boundary.
- echo: echo embeddings (arXiv:2402.15449, `data.prompts.surrounded`): the paper's zero-shot prompt, and for texts with an
  instruction the form of its released models. For causal attention; no export for stock tools can express it.
- quoted, prompt_eol, moee_style ...: the prompts of MOEE (arXiv:2410.10814), for `last_token` pooling of causal models that
  were not trained to embed. "quoted" is what its code calls no prompt; PromptEOL is arXiv:2307.16645. An instruction is on a
  line of its own before them; no export for stock tools can express what follows the text.
- e5_instruct: E5-mistral-7b-instruct (arXiv:2401.00368), GTE-Qwen2-instruct, and what follows them (SFR, Linq): documents
  are bare, every text ends with the end of text, the last token is pooled (`model.pooling=last_token`).
- qwen3_embedding: Qwen3-Embedding (arXiv:2506.05176), the same without the space, and "<|endoftext|>" at the end whatever the
  tokenizer calls its EOS token.
"""

WITH_EOS = "+eos"
"""Suffix of a template's name: the same template, with the EOS token at the end of embedded texts."""


def get_template(name: str) -> Template:
    """The template with that name or at that dotted path; after "+eos", with the EOS token at the end of embedded texts.

    Raises:
        ConfigError: there is no such template, the path leads to something else, or it has a suffix and an end.
    """
    template = resolve(name.removesuffix(WITH_EOS), TEMPLATES, "template")
    if not isinstance(template, Template):
        raise ConfigError(f"template '{name}' is a {type(template).__name__}; expected a Template")
    if name.endswith(WITH_EOS):
        template = replace(template, name=name, embedding_end="{eos}")
    if template.suffix and template.embedding_end:
        raise ConfigError(
            f"template '{template.name}' ends every text with {template.suffix!r}, whose last token is what is pooled; an end "
            f"of text after it would be pooled instead. Use it without embedding_end ({WITH_EOS})."
        )
    return template
