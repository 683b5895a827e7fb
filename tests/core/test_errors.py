"""Messages about names."""

import pytest

from unified_lm.core.errors import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("mpl", ["mlp", "attn"], " Did you mean 'mlp'?"),
        ("x", ["mlp", "attn"], " Known: attn, mlp."),
        ("x", [], ""),
        # keys and lists of a user's YAML hold anything
        ("x", [None, None], " Known: None, None."),
        ("x", [None], " Known: None."),
        ("x", [3, "a", True, 1.5], " Known: 1.5, 3, True, a."),
        (None, ["lora", "some"], " Known: lora, some."),
        (7, {77: 1, "b": 2}, " Did you mean '77'?"),
    ],
)
def test_the_closest_name_or_all_of_them(name, known, said):
    assert did_you_mean(name, known) == said
