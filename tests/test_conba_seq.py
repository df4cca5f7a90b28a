"""Sequential Conba against a float64 version of the paper's loop, and against Conba where they are the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.mixers import conba_state
from seqmodels.mixers.conba import Conba
from seqmodels.mixers.conba_loop import Loop, Tokens, advance, contracted, mit_gradient, transform
from seqmodels.mixers.conba_seq import ConbaSeq
from tests import conba_reference
from tests.test_conba import (
    MASK,
    SEGMENTS,
    SIZES,
    B,
    D,
    T,
    check_fresh,
    check_pieces,
    close,
    draw,
    equal,
    perturbed,
    sequence,
    slow,
    value_and_gradients,
)

CASES = {
    "default": {},
    "published": dict(fd="linear", scaling="literal", rule="published", gain="scalar"),
    "mit": dict(fd="mlp", h="mlp", rule="mit"),
    "spectral": dict(fd="mlp", scaling="literal", stability="spectral", control="off"),
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Documents begin inside them."""
    monkeypatch.setattr(conba_state, "CHUNK", 4)


@functools.cache
def conba_seq(case):
    module = ConbaSeq(**SIZES, **CASES[case])
    return module, perturbed(module)


@pytest.mark.parametrize("case", slow(*CASES))
def test_equals_the_loop_token_by_token(case):
    """Values, and gradients of inputs and parameters, of documents with padding on all sides and several chunks."""
    module, params = conba_seq(case)
    x, seq = draw(B, T, D, seed=3), sequence(jnp.asarray(SEGMENTS), jnp.asarray(MASK))[0]
    got = value_and_gradients(
        lambda p, x: module.apply({"params": p}, x, seq)[0] * MASK[..., None], params, x, "float32"
    )
    options = {name: getattr(module, name) for name in module.options.fields}
    naive = functools.partial(conba_reference.by_document, conba_reference.conba_seq)
    with jax.enable_x64(True):
        want = value_and_gradients(lambda p, x: naive(p, x, SEGMENTS, MASK, options), params, x, "float64")
    close(got[0], want[0])
    close(got[1], want[1], 2e-4)


@pytest.mark.parametrize("case", slow("published", "mit"))
def test_pieces_equal_the_whole(case):
    check_pieces(*conba_seq(case))


@pytest.mark.parametrize("case", slow("default", "mit"))
def test_a_fresh_layer_is_mamba_with_the_norms_of_jamba(case):
    check_fresh(ConbaSeq(**SIZES, **CASES[case]))


# The bridge to the parallel form


def bridge(seq_options, options):
    """Outputs and gradients of both mixers with the same parameters, which are perturbed."""
    loop = ConbaSeq(**SIZES, **seq_options)
    parallel = Conba(**SIZES, **options)
    params, x = perturbed(loop), draw(B, T, D, seed=3)
    params = {name: value for name, value in params.items() if name not in ("Z", "g")}
    seq = sequence(jnp.asarray(SEGMENTS), jnp.asarray(MASK))[0]
    neutral = dict(Z=jnp.zeros((3, 3)), g=jnp.full(3, conba_state.UNIT))
    zeros = dict(F=jnp.zeros((3, 3)), f=jnp.zeros(3))

    def run(module, more):
        return lambda p, x: module.apply({"params": {**p, **more}}, x, seq)[0]

    got = value_and_gradients(run(parallel, neutral | zeros), params, x, "float32")
    return got, value_and_gradients(run(loop, neutral), params, x, "float32")


def test_without_control_and_with_identities_both_forms_are_the_same():
    close(*bridge(dict(control="off"), dict(control="off")), 1e-4)


@pytest.mark.slow
def test_as_many_sweeps_as_tokens_are_the_closed_loop():
    """Documents have five: pass j is exact for the first j of them."""
    close(*bridge({}, dict(control="input", sweeps=5)), 1e-4)


# The MIT rule, and contraction


@pytest.mark.slow
def test_the_mit_rule_descends_the_gradient_of_the_next_error():
    """`mit_gradient` is jax.grad of |e_{t+1}|^2 by the gain of token t."""
    module, params = conba_seq("mit")
    inner, size, heads, state = module.inner, module.head_dim, module.heads, module.state
    loop = module.bind({"params": params}).loop(
        module.bind({"params": params}).stream_and_readout(draw(B, 2, D), sequence(length=2)[0])[0]
    )
    token = Tokens(
        draw(B, inner, seed=1), draw(B, module.rank, seed=2), draw(B, state, seed=3), draw(B, state, seed=4),
        reference=draw(B, inner, seed=5), step=jnp.zeros((B, heads)),
    )  # fmt: skip
    later = draw(B, state, seed=6)

    def error(gain):
        """e_{t+1}, with the state after token t."""
        old = dict(ssm=draw(B, state, inner, seed=7), gain=gain, error=jnp.zeros((B, heads, size)))
        old["sensitivity"] = jnp.zeros_like(old["ssm"])
        new, _ = advance(loop, size, old, token)
        seen = conba_state.read(new["ssm"], later)
        by_head = jnp.swapaxes(seen.reshape(B, heads, size), 1, 2)
        e = jnp.swapaxes(loop.h(by_head), 1, 2) - token.reference.reshape(B, heads, size)
        return jnp.sum(e**2), (new, e)

    gain = draw(B, heads, size, size, seed=8)
    want, (new, e) = jax.jit(jax.grad(error, has_aux=True))(gain)
    close(mit_gradient(new, e, later, loop, size), want)


def test_spectral_stability_makes_the_literal_loop_a_contraction():
    """Two states come nearer in every step, by any Z and f_d; without the limit this pair goes apart."""
    matrix = lambda seed: 3 * draw(3, 3, seed=seed)  # noqa: E731
    loop = Loop(
        -jnp.ones((4, 3)), jnp.ones((2, 4)), jnp.ones(4), F=matrix(1), f=draw(3), Z=matrix(2), g=jnp.full(3, 5.0),
        scaling="literal", stability="spectral",
    )  # fmt: skip
    first, second = draw(B, 3, 4, seed=3), draw(B, 3, 4, seed=4)
    distance = lambda loop: jnp.linalg.norm(transform(first, loop) - transform(second, loop), axis=1)  # noqa: E731
    before = jnp.linalg.norm(first - second, axis=1)
    assert (distance(contracted(loop)) < before).all() and (distance(loop) > before).all()
    small = loop.replace(Z=0.01 * loop.Z / jnp.linalg.norm(loop.F, 2))
    equal(contracted(small).Z, small.Z)  # nothing is made larger


def test_noise_is_in_training_only():
    module = ConbaSeq(**SIZES, process_noise=0.1, observation_noise=0.1)
    params, x, seq = perturbed(module), draw(B, T, D), sequence(None, jnp.asarray(MASK))[0]
    run = jax.jit(lambda **rngs: module.apply({"params": params}, x, seq, rngs=rngs))
    quiet = jax.jit(ConbaSeq(**SIZES).apply)({"params": params}, x, seq)
    close(run(), quiet)
    loud = run(dropout=jax.random.key(5))
    assert np.abs(loud[0] - quiet[0])[MASK].min(-1).max() > 0 and (loud[0] == quiet[0])[~MASK].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fd="linar"), "fd='linar': must be one of 'identity', 'linear', 'mlp'; did you mean 'linear'?"),
        (dict(control="output"), "control='output': must be one of 'off', 'input'"),
        (dict(stability="spectral"), "stability='spectral': must be 'none' unless model.conba_seq.scaling='literal'"),
        (dict(head_dim=3), "head_dim=3: must be a divisor of expand * model.width = 16"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError) as error:
        ConbaSeq(D, **dict(head_dim=4) | options)
    assert str(error.value).startswith(f"config.model.conba_seq.{message}") and "\n" not in str(error.value)
