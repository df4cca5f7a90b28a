"""Settings of tasks that do not fit, and rows that are too short or hardly exist."""

import numpy as np
import pytest

from seqmodels.data.synthetic import listops, make_task
from seqmodels.errors import UserError


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("mqra", {}, r"config.data.name='mqra': must be one of copying, .*; did you mean mqar\?"),
        ("mqar", dict(pairs=3), "config.data.task.pairs: mqar has no such field; its fields are vocab, shapes"),
        ("copying", dict(vocab=3), "config.data.task.vocab=3: must be at least 4"),
        ("copying", dict(tokens=0), "tokens=0: must be at least 1"),
        ("induction", dict(vocab=2), "vocab=2: must be at least 3"),
        ("recall", dict(vocab=4), "vocab=4: must be at least 5"),
        ("mqar", dict(vocab=16, shapes=((64, 8, 1.0),)), r"shapes=.*at most 7 pairs, as vocab=16"),
        ("mqar", dict(shapes=((64, 17, 1.0),)), r"shapes=.*at least 4 for each"),
        ("mqar", dict(shapes=((63, 4, 1.0),)), "even number"),
        ("mqar", dict(shapes=((64, 4),)), "triples"),
        ("mqar", dict(test_shapes=((64, 40),)), "test_shapes"),
        ("mqar", dict(power=0.0), "power=0.0: must be greater than 0"),
        ("parity", dict(ask="all"), "ask='all': must be 'last' or 'every'"),
        ("parity", dict(ask="every", shortest=2), "shortest=2"),
        ("modular_arithmetic", dict(operators="+/"), r"operators='\+/': must be one or several of \+-\*"),
        ("modular_arithmetic", dict(modulus=1), "modulus=1: must be at least 2"),
        ("word_problem", dict(group="s9"), "group='s9': must be s2 to s5"),
        ("word_problem", dict(group="q8"), "group='q8'"),
        ("listops", dict(depth=2, arguments=3, shortest=10, longest=20), "shortest=10: must be less than 5"),
        ("listops", dict(shortest=10, longest=11), "longest=11: must be at least 12"),
        ("passkey", dict(depth=1.5), "depth=1.5: must be from 0 to 1, or -1"),
        ("in_context_recall", dict(vocab=4, noise_vocab=3), "noise_vocab=3: must be from 0 to .* 2"),
        ("in_context_recall", dict(noise=0.1), "noise_vocab=0: must be at least 1 with noise"),
        ("in_context_recall", dict(noise=1.0, noise_vocab=2), "noise=1.0: must be at least 0 and less than 1"),
        ("fuzzy_recall", dict(vocab=6), "longest=3: must be from 1 to 2, as vocab=6"),
        ("fuzzy_recall", dict(shortest=4), "shortest=4: must be from 1 to .* 3"),
        ("memorization", dict(vocab=4), "vocab=4: must be at least 5"),
        ("compression", dict(vocab=2), "vocab=2: must be at least 3"),
        ("regular_language", dict(vocab=3), "vocab=3: must be at least 4, more than config.data.task.edges"),
        ("regular_language", dict(most_states=3), "most_states=3: must be at least 4"),
        ("regular_language", dict(longest=0), "longest=0: must be at least 1"),
        ("string_copy", dict(ask="infix"), "ask='infix': must be 'copy', 'prefix' or 'suffix'"),
        ("string_copy", dict(letters=27), "letters=27: must be from 2 to 26"),
        ("string_copy", dict(gram=0), "gram=0: must be at least 1"),
        ("transduction", dict(language="revers"), "language='revers': must be one of even_pairs"),
    ],
)
def test_bad_settings_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message) as error:
        make_task(name, fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, fields, length",
    [
        ("copying", dict(tokens=5), 9),
        ("induction", {}, 3),
        ("recall", {}, 5),
        ("mqar", dict(shapes=((64, 4, 1.0), (128, 4, 1.0))), 64),
        ("parity", dict(shortest=3), 3),
        ("parity", {}, 1),
        ("modular_arithmetic", dict(shortest=4), 5),
        ("word_problem", dict(shortest=4), 3),
        ("listops", dict(longest=600), 599),
        ("passkey", {}, 36),
        ("in_context_recall", {}, 20),
        ("fuzzy_recall", {}, 11),
        ("memorization", {}, 7),
        ("compression", {}, 1),
        ("regular_language", {}, 1),
        ("string_copy", dict(ask="suffix", gram=3), 12),
        ("string_copy", {}, 3),
        ("transduction", dict(shortest=5), 9),
    ],
)
def test_short_rows_are_refused(name, fields, length):
    with pytest.raises(UserError, match=f"config.seq_len={length}: must be"):
        make_task(name, fields).check(length)


def test_rows_that_hardly_exist_are_refused(monkeypatch):
    """Where they are drawn until one fits, that would take for ever."""
    with pytest.raises(UserError, match=r"gram=1: must be larger, .* 57 letters, and with over 10 almost no part"):
        make_task("string_copy", dict(ask="suffix", letters=2, gram=1)).check(63)
    make_task("string_copy", dict(ask="suffix", letters=2, gram=4)).check(63)
    monkeypatch.setattr(listops, "ATTEMPTS", 100)
    task = make_task("listops", dict(depth=10, arguments=2, shortest=1500, longest=1600))
    with pytest.raises(UserError, match=r"task\.shortest=1500: must be smaller, as of 100 random trees none has more"):
        task.rows(np.random.default_rng(0), 1, 1600)
