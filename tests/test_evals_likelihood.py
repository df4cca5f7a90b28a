"""Likelihoods of packed requests against each request alone, a token at a time, summed in float64; classification."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as tk
from flax import linen as nn

from seqmodels.configs import densemamba, transformer
from seqmodels.data import load_tokenizer
from seqmodels.errors import UserError
from seqmodels.evals import classification, likelihood
from seqmodels.evals.likelihood import Request
from seqmodels.evals.tasks import build as tasks
from seqmodels.training.sharding import AXES, RULES
from tests.likelihood_models import BYTES, alone, model_and_params, step

PIECE = 16


@pytest.fixture(scope="module")
def recurrent():
    return model_and_params(densemamba)


@pytest.fixture(scope="module")
def attention():
    return model_and_params(transformer)


def requests_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Request(np.append(256, rng.integers(0, 128, n)).astype(np.int32), int(rng.integers(1, n + 1))) for n in lengths
    ]


def with_greedy_ones(model, params, requests):
    """The same with two more, whose last tokens are the model's own choice: both are greedy, and one more is not."""
    added = []
    for tokens in (requests[0].tokens[:5], requests[1].tokens[:4]):
        state = model.init_state(1, 64)
        for token in tokens:
            logits, state = step(model, params, jnp.int32(token), state)
        added.append(Request(np.append(tokens, int(np.argmax(logits))).astype(np.int32), 1))
    return [*requests, *added, Request(added[0].tokens, 3)]


def agree(scores, model, params, requests):
    for score, request in zip(scores, requests, strict=True):
        nats, greedy = alone(model, params, request)
        np.testing.assert_allclose(score.nats, nats, rtol=2e-5)
        assert score.greedy is greedy
    assert {score.greedy for score in scores} == {True, False}


def test_packed_requests_cost_what_each_costs_alone(recurrent):
    """Of a recurrent model requests may be longer than a piece, and go on from piece to piece."""
    model, params = recurrent
    requests = with_greedy_ones(model, params, requests_of([3, 1, 50, 20, 7, 7, 16, 33, 2]))
    agree(likelihood.score(model, params, requests, piece=PIECE, batch_size=2), model, params, requests)


def test_a_transformers_rows_hold_whole_requests(attention):
    model, params = attention
    requests = with_greedy_ones(model, params, requests_of([3, 1, 24, 20, 7, 7, 16, 9, 2]))
    scores = likelihood.score(model, params, requests, piece=PIECE, batch_size=2, context=24)
    agree(scores, model, params, requests)


def test_rows_spread_over_devices(recurrent):
    model, params = recurrent
    requests = with_greedy_ones(model, params, requests_of([3, 40, 7]))
    mesh = jax.make_mesh((2, 1, 2, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        scores = likelihood.score(model, params, requests, piece=PIECE, batch_size=3, mesh=mesh)
    agree(scores, model, params, requests)


@pytest.mark.parametrize("capacity", [None, 9, 30])
def test_every_request_is_in_one_row(capacity):
    lengths = np.random.default_rng(1).integers(1, 10, 50).tolist()
    rows = likelihood.pack(lengths, capacity, 4)
    assert sorted(i for row in rows for i in row) == list(range(50))
    used = [sum(lengths[i] for i in row) for row in rows]
    if capacity is None:
        assert len(rows) == 4 and max(used) - min(used) <= max(lengths)
    else:
        assert max(used) <= capacity and len(rows) <= 1.2 * sum(lengths) / capacity + 1


def test_texts_and_continuations_become_tokens():
    first, second, empty = likelihood.continuations(BYTES, [("ab", " cd"), ("ab ", "cd"), ("", "xy")])
    assert first.tokens.tolist() == second.tokens.tolist() == [256, *b"ab cd"] and first.scored == second.scored == 3
    assert empty.tokens.tolist() == [256, *b"xy"] and empty.scored == 2
    (cut,) = likelihood.continuations(BYTES, [("abcdef", "gh")], context=4)  # 4 tokens in, the last 2 out
    assert cut.tokens.tolist() == [*b"defgh"] and cut.scored == 2
    for pair, words in (
        (("ab", ""), "0 tokens: must be at least one"),
        (("a", "bcdef"), "at most 4, the Transformer's"),
    ):
        with pytest.raises(UserError, match=words):
            likelihood.continuations(BYTES, [pair], context=4)


def test_a_token_may_span_the_join_of_context_and_continuation(tmp_path):
    """Kind: refused though it is fine. As lm-eval's own models split a pair, and with both alone where that fails."""
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet)
    made.train_from_iterator(["Answer: the world says hello world, answer here. "] * 50, trainer)
    made.save(str(tmp_path / "span.json"))
    tokenizer = load_tokenizer(str(tmp_path / "span.json"))

    def encoded(text):
        return made.encode(text).ids

    pairs = [("hello wor", "ld"), ("Ans", "wer"), ("hello ", "world"), ("hello", " world"), ("hello wo", "rld, he")]
    spanned = 0
    for pair, request in zip(pairs, likelihood.continuations(tokenizer, pairs), strict=True):
        context = pair[0].rstrip()
        continuation = pair[0][len(context) :] + pair[1]
        theirs = encoded(context + continuation)[len(encoded(context)) :]  # `_encode_pair` of lm-eval
        if not theirs:
            spanned += 1
            theirs = encoded(continuation)
            assert request.tokens[1:].tolist() == encoded(context) + theirs
        assert request.tokens[len(request.tokens) - request.scored :].tolist() == theirs
    assert spanned > 1
    with pytest.raises(UserError, match="0 tokens"):
        likelihood.continuations(tokenizer, [("hello", "")])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 11, 12])
def test_windows_predict_every_token_once_and_see_all_they_can(length):
    text = "abcdefghijklmno"[:length]
    whole = [256, *text.encode()]
    windows = likelihood.windows(BYTES, text, context=4)
    predicted = [t for window in windows for t in window.tokens[len(window.tokens) - window.scored :].tolist()]
    assert predicted == whole[1:]
    assert all(len(window.tokens) == min(5, length + 1) for window in windows)
    assert len(windows) == -(-length // 4)
    assert [w.tokens.tolist() for w in likelihood.windows(BYTES, text)] == ([whole] if length else [])


# Classification

EXAMPLES = [
    classification.Example("the cat", [" sat", " flew far away", " x"], 1),
    classification.Example("one two", [" three", " b"], 0),
]


def test_classification_counts_right_answers():
    nats = [np.array([4.0, 7.0, 3.5]), np.array([2.0, 9.0])]  # likeliest: 2 and 0; a byte: 1 (14 bytes) and 0
    figures = classification.figures(EXAMPLES, nats)
    assert figures == dict(
        accuracy=0.5, accuracy_norm=1.0, stderr=pytest.approx((0.25 / 2) ** 0.5), chance=(1 / 3 + 1 / 2) / 2, examples=2
    )


def test_classification_of_a_model(recurrent):
    model, params = recurrent
    expected = []
    for example in EXAMPLES:
        pairs = [(example.prompt, choice) for choice in example.choices]
        expected.append(np.array([alone(model, params, r)[0] for r in likelihood.continuations(BYTES, pairs)]))
    found = classification.evaluate(model, params, BYTES, EXAMPLES, piece=PIECE, batch_size=2)
    assert found == classification.figures(EXAMPLES, expected)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "data.jsonl:2: must be a JSON object"),
        ('{"prompt": "a", "choices": ["b"]}', "prompt, choices and answer"),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', "choices a list of strings"),
        ('{"prompt": "a", "choices": ["b"], "answer": 1}', "answer=1: must be the index of one of the 1 choices"),
        ('{"prompt": "a", "choices": ["b"], "answer": true}', "answer=True"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line, words):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=words) as error:
        classification.read(path)
    assert "\n" not in str(error.value)
    assert classification.read(path, limit=1) == [classification.Example("a", ["b", "c"], 1)]


def test_files_are_found_or_missed_by_name(tmp_path):
    config = densemamba.get_config()
    assert classification.files(config) == [classification.DEFAULT]
    classification.check(config)
    config.evaluation.classification = str(tmp_path / "*.jsonl")
    with pytest.raises(UserError, match=r"classification='.*\*.jsonl': matches no file"):
        classification.check(config)


@pytest.mark.parametrize("make", [tasks.endings, tasks.cloze, tasks.passages])
def test_the_task_files_are_what_the_book_gives(make):
    lines = (tasks.FOLDER / f"{make.__name__}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == make(tasks.sentences(), tasks.random.Random(0))
