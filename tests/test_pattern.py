"""The pattern language."""

import subprocess
import sys

import pytest

from seqmodels.errors import UserError
from seqmodels.pattern import names, parse

MAMBA, MLP, ATTENTION = ("mamba",), ("mlp",), ("attention",)


@pytest.mark.parametrize(
    "pattern, blocks",
    [
        ("mamba", [(MAMBA,)]),
        ("mamba attention+mlp", [(MAMBA,), (ATTENTION, MLP)]),
        ("mamba+attention+mlp", [(MAMBA, ATTENTION, MLP)]),
        ("attention|mlp", [(("attention", "mlp"),)]),
        ("mamba|attention+mlp", [(("mamba", "attention"), MLP)]),
        ("bi:mamba+mlp", [(("bi:mamba",), MLP)]),
        ("mamba+mlp x3", [(MAMBA, MLP)] * 3),
        ("mamba x 2 attention", [(MAMBA,), (MAMBA,), (ATTENTION,)]),
        ("(mamba attention+mlp) x2", [(MAMBA,), (ATTENTION, MLP)] * 2),
        ("((mamba x2) attention)x2", [(MAMBA,), (MAMBA,), (ATTENTION,)] * 2),
        ("mamba x4 attention@1/2", [(MAMBA,), (ATTENTION,)] * 2),
        ("mamba+mlp x4 +gla@3/4", [(MAMBA, MLP)] * 3 + [(MAMBA, ("gla",))]),
        ("mamba x2 attention|mlp@0/2", [(("attention", "mlp"),), (MAMBA,)]),
    ],
)
def test_blocks(pattern, blocks):
    assert parse(pattern) == blocks


def test_jamba():
    """Layers with attention at 4, and another channel mixer at odd ones: Lieber et al. 2024, arXiv 2403.19887."""
    blocks = parse("(mamba+mlp) x8 attention@4/8 +gla@1/2")
    assert [block[0] for block in blocks] == [MAMBA] * 4 + [ATTENTION] + [MAMBA] * 3
    assert [block[1] for block in blocks] == [MLP, ("gla",)] * 4


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("", "it must be at least one block"),
        ("mamba mmaba", "word 2, 'mmaba', must be one of attention, "),
        ("mamba mmaba", "did you mean 'mamba'?"),
        ("mamba attention+mpl", "'mpl' of word 2, 'attention+mpl', must be one of "),
        ("attention|mpl", "did you mean 'mlp'?"),
        ("bi:mmaba", "'mmaba' of word 1, 'bi:mmaba', must be"),
        ("mamba+", "'nothing' of word 1, 'mamba+', must be one of"),
        ("x3", "word 1, 'x3', must be behind the block that it repeats"),
        ("mamba x0", "word 2, 'x0', must be"),
        ("mamba)", "word 2, ')', must be behind a '('"),
        ("(mamba", "must be closed by a ')'"),
        ("()", "must be before at least one block"),
        ("mamba x4 attention@4/4", "word 3, 'attention@4/4', must be at a block below the period"),
        ("mamba x4 attention@1/8", "the period at most 4"),
        ("mamba x4 +mlp@1/2", "block 1 has nothing behind a '+'"),
        ("mamba attention@1", "such as attention@4/8 or +moe@1/2"),
    ],
)
def test_errors_point_at_the_word(pattern, words):
    with pytest.raises(UserError) as error:
        parse(pattern)
    message = str(error.value)
    assert message.startswith(f"config.model.pattern={pattern!r}: ") and words in message and "\n" not in message


def test_names():
    assert names("bi:mamba attention+mlp mamba|mlp") == ["mamba", "attention", "mlp"]


def test_no_jax():
    script = (
        "import sys; from seqmodels.pattern import parse; parse('mamba attention+mlp'); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
