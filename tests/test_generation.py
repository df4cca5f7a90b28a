"""Decoding against full passes over the same text, and sampling against its definition and the transformers library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import generation
from seqmodels.backbone import context
from seqmodels.configs import densemamba, transformer
from seqmodels.data import load_tokenizer
from seqmodels.errors import UserError
from seqmodels.generation import Sampling, chunks, decode, draw, filtered, generate, prefill
from seqmodels.model import build
from seqmodels.rounding import rounded
from seqmodels.training.sharding import unbox

VOCAB = 257  # padded to 264


@functools.cache
def tiny(name):
    """A small model with parameters large enough that predictions differ from text to text."""
    config = {"densemamba": densemamba, "transformer": transformer}[name].get_config().model.unlock()
    config.update(width=32, repeats=2)
    if name == "transformer":
        config.mlp.hidden = 48
    model = build(config, VOCAB)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, noisy)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    hidden, _ = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, hidden, method="logits")


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def greedy_by_full_passes(model, params, prompt, tokens):
    """Each token from one pass over all the text before it, without any state."""
    ids = list(prompt)
    for _ in range(tokens):
        row = np.zeros((1, 32), np.int32)  # padded behind, which causality allows
        row[0, : len(ids)] = ids
        ids.append(int(np.argmax(full_logits(model, params, row)[0, len(ids) - 1, :VOCAB])))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densemamba", "transformer"])
def test_greedy_decoding_of_prompts_of_different_lengths_equals_full_passes(name):
    model, params = tiny(name)
    prompts = [text(1, 1), text(7, 2)]
    out = decode(model, params, prompts, tokens=8, vocab_size=VOCAB, sampling=Sampling(temperature=0.0))
    expected = [greedy_by_full_passes(model, params, prompt, 8) for prompt in prompts]
    assert out.tolist() == expected
    assert expected[0] != expected[1]  # or the test shows nothing


@pytest.mark.parametrize("name", [pytest.param("densemamba", marks=pytest.mark.slow), "transformer"])
def test_prefill_in_chunks_gives_the_hidden_state_of_a_full_pass(name, monkeypatch):
    model, params = tiny(name)
    monkeypatch.setattr(generation, "LARGEST_CHUNK", 4)
    tokens = np.array([text(13)], np.int32)
    state = generation.fresh_state(model, 1, 32)
    hidden, state = prefill(model, params, tokens, np.ones((1, 13), bool), state)
    logits = model.apply({"params": params}, hidden, method="logits")[:, 0]
    np.testing.assert_allclose(logits, full_logits(model, params, tokens)[:, -1], rtol=1e-4, atol=1e-4)
    assert int(state["position"][0]) == 13


def test_chunks_are_few_powers_of_two_that_sum_up(monkeypatch):
    monkeypatch.setattr(generation, "LARGEST_CHUNK", 64)
    for length in range(1, 300):
        sizes = chunks(length)
        assert sum(sizes) == length and set(sizes) <= {1, 2, 4, 8, 16, 32, 64}
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_lengths_do_not_recompile():
    model, params = tiny("densemamba")
    run = functools.partial(decode, model, params, vocab_size=VOCAB)
    run([text(7)], tokens=5, sampling=Sampling(top_k=3))  # chunks of 4, 2, 1; room for 8
    before = generation.read_chunk._cache_size(), generation.draw_tokens._cache_size()
    for length, tokens in ((1, 8), (5, 6), (6, 5), (4, 7)):
        run([text(length)], tokens=tokens, seed=length, sampling=Sampling(0.5, 7, 0.9))
    assert (generation.read_chunk._cache_size(), generation.draw_tokens._cache_size()) == before


def test_state_of_a_recurrent_model_does_not_grow():
    model, _ = tiny("densemamba")
    sizes = [jax.tree.map(jnp.shape, model.init_state(1, length)) for length in (1, 1000)]
    assert sizes[0] == sizes[1]


def test_a_row_does_not_depend_on_the_others():
    model, params = tiny("densemamba")
    prompts = [text(6, 4), text(3, 5)]
    run = functools.partial(decode, model, params, tokens=8, vocab_size=VOCAB, seed=3)
    assert run(prompts)[0].tolist() == run(prompts[:1])[0].tolist()


def test_seeds():
    model, params = tiny("densemamba")
    run = functools.partial(decode, model, params, [text(6, 4)], tokens=8, vocab_size=VOCAB)
    assert run(seed=1).tolist() == run(seed=1).tolist() != run(seed=2).tolist()


def test_padded_ids_are_never_drawn():
    model, params = tiny("densemamba")
    # The likeliest ids without the limit are all beyond it.
    biased = dict(params, embedding=params["embedding"].at[250:].multiply(30.0))
    run = functools.partial(decode, model, biased, [text(6, i) for i in range(2)], tokens=8)
    assert run(vocab_size=264).max() >= 250
    for temperature in (0.0, 1.0):
        assert run(vocab_size=250, sampling=Sampling(temperature)).max() < 250


def test_stop_ends_a_row_and_fills_it_up():
    model, params = tiny("densemamba")
    prompts = [text(7, 2), text(6, 3)]
    run = functools.partial(decode, model, params, prompts, tokens=8, vocab_size=VOCAB, sampling=Sampling(0.0))
    free = run()
    stop = int(free[0, 4])
    end = free[0].tolist().index(stop)
    stopped = run(stop=stop)
    assert stopped[0].tolist() == free[0, :end].tolist() + [stop] * (8 - end)
    if stop not in free[1]:
        assert stopped[1].tolist() == free[1].tolist()


# Sampling


def test_top_k_and_top_p_by_their_definitions():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))

    def kept(**fields):
        return np.flatnonzero(np.isfinite(filtered(logits, Sampling(**fields))[0])).tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.69) == [0, 1] and kept(top_p=0.71) == [0, 1, 2]
    assert kept(top_p=1e-9) == [0]
    assert kept(top_k=2, top_p=0.6) == [0, 1] and kept(top_k=2, top_p=0.55) == [0]  # 0.57 of what top_k leaves
    assert kept(temperature=0.1, top_p=0.9) == [0]


def test_filters_equal_those_of_transformers():
    torch = pytest.importorskip("torch", reason="oracle on Python 3.11")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32) * 3
    for temperature, top_k, top_p in ((1.0, 5, 1.0), (0.7, 50, 0.8), (1.3, 12, 0.9), (2.0, 50, 0.1)):
        expected = torch.tensor(logits)
        for warper in (
            logits_process.TemperatureLogitsWarper(temperature),
            logits_process.TopKLogitsWarper(top_k),
            logits_process.TopPLogitsWarper(top_p),
        ):
            expected = warper(None, expected)
        got = filtered(jnp.asarray(logits), Sampling(temperature, top_k, top_p))
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_draws_have_the_filtered_frequencies():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = draw(keys, jnp.broadcast_to(logits, (4000, 4)), Sampling(temperature=0.5, top_k=3))
    expected = np.array([0.5, 0.25, 0.15, 0]) ** 2 / (0.5**2 + 0.25**2 + 0.15**2)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 4000, expected, atol=0.03)


def test_rows_may_be_sampled_differently():
    logits = jnp.log(jnp.broadcast_to(jnp.array([0.3, 0.4, 0.3]), (200, 3)))
    greedy = jnp.arange(200) < 100
    tokens = np.asarray(draw(jax.random.split(jax.random.key(0), 200), logits, Sampling(jnp.where(greedy, 0.0, 1.0))))
    assert set(tokens[:100]) == {1} and set(tokens[100:]) == {0, 1, 2}


# Text


def test_generate_text():
    model, params = tiny("densemamba")
    tokenizer = load_tokenizer("bytes")
    run = functools.partial(generate, model, params, tokenizer, "It is", tokens=8, temperature=0.0)
    expected = greedy_by_full_passes(model, params, [tokenizer.separator, *tokenizer.encode("It is")], 8)
    if tokenizer.separator in expected:
        expected = expected[: expected.index(tokenizer.separator)]
    assert run() == tokenizer.decode(expected)
    assert generate(model, params, tokenizer, "", tokens=5, seed=1) is not None  # a document from nothing
    whole = run()
    assert run(stop=whole[-1]) == whole.split(whole[-1])[0]


def test_prompt_longer_than_a_transformers_context():
    config = transformer.get_config()
    assert context(config) == config.seq_len and context(densemamba.get_config()) is None
    model, params = tiny("transformer")
    run = functools.partial(generate, model, params, load_tokenizer("bytes"), tokens=8, context=context(config))
    with pytest.raises(UserError, match="prompt of 301 tokens and tokens=8 exceed the Transformer's context of 256"):
        run("x" * 300)
    assert isinstance(run("x" * 6), str)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(tokens=0), "tokens=0: must be at least 1"),
        (dict(temperature=-1.0), "temperature=-1.0: must be at least 0"),
        (dict(top_k=-1), "top_k=-1: must be at least 0"),
        (dict(top_p=0.0), r"top_p=0.0: must be in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5: must be in \(0, 1\]"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf: must be at least 0, and finite"),
    ],
)
def test_numbers_that_make_no_sense(fields, message):
    model, params = tiny("densemamba")
    with pytest.raises(UserError, match=message):
        generate(model, params, load_tokenizer("bytes"), "x", **dict(dict(tokens=3), **fields))


def test_empty_prompts():
    model, params = tiny("densemamba")
    with pytest.raises(UserError, match="at least one token"):
        decode(model, params, [[1], []], tokens=3, vocab_size=VOCAB)


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6])
def test_prompts_with_ids_outside_the_vocabulary(token):
    model, params = tiny("densemamba")
    with pytest.raises(UserError, match=f"prompt has the token id {token}: must be from 0 to 256"):
        decode(model, params, [[1], [2, token]], tokens=3, vocab_size=VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(temperature):
    model, params = tiny("densemamba")
    spoilt = dict(params, embedding=params["embedding"].at[256].set(jnp.nan))  # the head's table, too
    with pytest.raises(UserError, match="logits for token 1 of row 1 are not finite"):
        decode(model, spoilt, [text(6)], tokens=8, vocab_size=VOCAB, sampling=Sampling(temperature))


# Rounded parameters


@pytest.mark.slow
@pytest.mark.parametrize("name, scan_blocks", [("densemamba", 0), ("densemamba", 1), ("transformer", 0)])
def test_rounded_parameters_give_the_same_results(name, scan_blocks):
    config = {"densemamba": densemamba, "transformer": transformer}[name].get_config().model.unlock()
    config.update(width=32, repeats=4, dtype="bfloat16", scan_blocks=scan_blocks)
    model = build(config, VOCAB)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    blocks, head = rounded(model, params)
    kept = {
        path[-1].key
        for path, leaf in jax.tree.leaves_with_path(blocks)
        if leaf.dtype == jnp.float32 and "mixer" in jax.tree_util.keystr(path)
    }
    assert kept == ({"A_log", "D", "conv_bias", "conv_weight", "dt_bias"} if name == "densemamba" else set())
    assert blocks["embedding"].dtype == jnp.float32 and head["embedding"].dtype == jnp.bfloat16

    tokens = np.array([text(6)], np.int32)
    hidden, _ = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": blocks}, tokens)[0], hidden)
    logits = functools.partial(model.apply, method="logits")
    np.testing.assert_array_equal(logits({"params": head}, hidden), logits({"params": params}, hidden))


def test_plain_sampling_draws_what_sorting_would():
    logits = jax.random.normal(jax.random.key(0), (64, 50))
    keys = jax.random.split(jax.random.key(1), 64)
    assert [generation.cheapest_method(Sampling(*x)) for x in ((0,), (0.5,), (0.5, 3), (0.5, 0, 0.9))] == [
        "greedy",
        "plain",
        "filtered",
        "filtered",
    ]
    for temperature, method in ((0.7, "plain"), (jnp.arange(64) % 2 * 0.7, "plain"), (0.0, "greedy")):
        sampling = Sampling(temperature)
        np.testing.assert_array_equal(draw(keys, logits, sampling, method), draw(keys, logits, sampling))


@pytest.mark.slow
def test_a_lone_row_on_a_gpu_is_run_twice(monkeypatch):
    model, params = tiny("densemamba")
    run = functools.partial(decode, model, params, [text(5)], tokens=3, vocab_size=VOCAB, seed=2)
    alone = run()
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("seqmodels.kernels.dispatch.platforms", lambda: ("cpu",))
    assert run().tolist() == alone.tolist()
    jax.clear_caches()
