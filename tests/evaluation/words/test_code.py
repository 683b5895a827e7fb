"""The built-in tagged set: exact tags on known code, and the same data at every call."""

from unified_lm.evaluation.words.code import MAX_WORDS, MIN_WORDS, code_words, module_sentences
from unified_lm.evaluation.words.data import iob2

SOURCE = b'''
import os.path
LIMIT = 3

class Broken(ValueError):
    pass

def fetch(name, depth=LIMIT, *rest):
    """Left out."""
    root = os.path.join(name, "x")
    list = [fetch(root, depth=-1)]
    if depth - 1 > len(name) or list:
        raise Broken(self.size, name, depth, rest)
'''


def test_tags_of_known_code() -> None:
    first, second, third = module_sentences(SOURCE)
    assert " ".join(first.words) == "def fetch ( name , depth = LIMIT , * rest ) :"
    roles = dict(zip(first.words, first.tags["pos"]))
    assert roles["fetch"] == "DEF"
    assert roles["name"] == roles["depth"] == roles["rest"] == "PARAM"
    assert roles["LIMIT"] == "VAR"
    assert roles["="] == "BIND"
    assert first.tags["chunk"][5:8] == ("B-PARAM", "I-PARAM", "I-PARAM")
    assert first.tags["ner"][7] == "B-CONSTANT"

    by_word = {task: list(zip(second.words, second.tags[task])) for task in second.tags}
    assert second.words[:5] == ("root", "=", "os", ".", "path")
    assert [tag for _, tag in by_word["chunk"][2:7]] == ["B-CALL", *["I-CALL"] * 4]
    assert [tag for _, tag in by_word["ner"][2:7]] == ["B-MODULE", *["I-MODULE"] * 4]
    assert by_word["pos"][1] == ("=", "ASSIGN")
    assert [tag for word, tag in by_word["pos"] if word == "-"] == ["UNARY", "OP"]
    assert [tag for word, tag in by_word["pos"] if word == "depth"] == ["KWARG", "VAR"]
    assert ("len", "B-FUNCTION") in by_word["ner"]
    assert [tag for word, tag in by_word["ner"] if word == "list"] == ["O", "O"]  # a local name shadows the class
    assert second.breaks == {12, 25}
    assert third.words[:6] == ("raise", "Broken", "(", "self", ".", "size")
    assert third.tags["ner"][1] == "B-EXCEPTION"
    assert third.tags["pos"][5] == "ATTR"


def test_what_cannot_be_read_gives_nothing() -> None:
    assert module_sentences(b"def f(:\n") == []
    assert module_sentences("def f():\n    return 'é'\n".encode()) == []


def test_the_set_is_held_out_by_module_and_repeats() -> None:
    data = code_words(40, 20)
    assert (len(data.train), len(data.test)) == (40, 20)
    assert all(MIN_WORDS <= len(sentence.words) <= MAX_WORDS for sentence in (*data.train, *data.test))
    assert not {sentence.words for sentence in data.train} & {sentence.words for sentence in data.test}
    for sentence in data.train:
        assert all(len(tags) == len(sentence.words) for tags in sentence.tags.values())
        assert all(iob2(sentence.tags[task]) == sentence.tags[task] for task in ("chunk", "ner"))
    code_words.cache_clear()
    assert code_words(40, 20).key == data.key
