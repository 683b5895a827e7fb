"""Small tagged data for tests: sentences in which tags follow from the words, or only from what comes after them."""

from pathlib import Path

import numpy as np

from unified_lm.evaluation.words.data import Sentence, WordData

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
"""

CONLLU = (
    "# sent_id = 1\n# text = Don't go\n1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_\n1\tDo\tdo\tAUX\t_\t_\t0\troot\t_\t_\n"
    "2\tn't\tnot\tPART\t_\t_\t1\tadvmod\t_\t_\n2.1\tghost\t_\tX\t_\t_\t_\t_\t_\t_\n3\t#\t#\tSYM\t_\t_\t1\tpunct\t_\t_\n"
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def random_data(num_train: int = 60, num_test: int = 30, seed: int = 0) -> WordData:
    """Tags: "pos" is decided by the word alone, "ner" by the next word, "chunk" by the one before. Words are single letters."""
    rng = np.random.default_rng(seed)

    def sentence() -> Sentence:
        words = tuple(rng.choice(list("bcdxyz"), 8).tolist())
        after = (*words[1:], "b")
        before = ("b", *words[:-1])
        tags = {
            "pos": tuple("EARLY" if word[0] < "m" else "LATE" for word in words),
            "ner": tuple("B-EARLY" if word[0] < "m" else "O" for word in after),
            "chunk": tuple("B-EARLY" if word[0] < "m" else "O" for word in before),
        }
        return Sentence(words, tags)

    return WordData(
        "random",
        tuple(sentence() for _ in range(num_train)),
        tuple(sentence() for _ in range(num_test)),
        ("pos", "chunk", "ner"),
    )
