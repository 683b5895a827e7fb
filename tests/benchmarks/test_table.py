"""The table of ratios reads what the benchmarks print, and names commands that exist."""

import pytest

from benchmarks.table import CLAIMS, ROOT, Claim, ratio_of

PRINTED = """CPU, 2 threads
unified_lm                median 1.00 s
packed is 2.56 times faster (per repetition: [2.5, 2.61, 2.56])
LoRA (ours)          median 1.10 s, 930 tokens/s, 1.21 times as fast as full fine-tuning (1.18 to 1.26)
unified_lm, all graphs kept: 1.80 times as fast [1.70, 1.90]
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [("", (2.56, 2.5, 2.61)), ("LoRA (ours)", (1.21, 1.18, 1.26)), ("all graphs kept: ", (1.8, 1.7, 1.9))],
)
def test_ratios_are_read(words: str, expected: tuple[float, float, float]) -> None:
    assert ratio_of(Claim("", "x.py", words), PRINTED) == expected


def test_a_line_without_a_ratio_ends_it() -> None:
    with pytest.raises(SystemExit, match="no ratio in a line with 'echo'"):
        ratio_of(Claim("", "x.py", "echo"), PRINTED)


def test_the_commands_exist() -> None:
    for claim in CLAIMS.values():
        assert (ROOT / "benchmarks" / claim.command.split()[0]).is_file()
