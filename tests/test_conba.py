"""Conba against float64 versions that go token by token, with every switch; and what its equations promise."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.mixers import conba_state
from seqmodels.mixers.conba import Conba
from seqmodels.mixers.conba_gain import adapt, unit
from seqmodels.mixers.conba_state import Memory, Plant, Tokens, read_states
from seqmodels.mixers.mamba import Mamba
from seqmodels.sequence import make_sequence
from tests import conba_reference

B, T, D = 2, 13, 8
SIZES = dict(width=D, state=3, head_dim=4, layers=2)
SEGMENTS = np.array([[0] * 6 + [1] * 7, [4] * 7 + [5] * 6], np.int32)  # of five real tokens each
MASK = np.array([[1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]], bool)
CASES = {
    "default": {},
    "published": dict(delay=0, scaling="literal", gain="scalar", rule="published"),
    "open": dict(delay=3, scaling="off", control="off"),
    "input": dict(delay=2, control="input", sweeps=2),
    "folded": dict(delay=2, state_eval="folded"),
    "folded off": dict(delay=0, scaling="off", control="off", state_eval="folded"),
}


def slow(*cases):
    """All but the first are slow."""
    return [cases[0], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[1:])]


every_case = pytest.mark.parametrize("case", slow(*CASES))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Documents begin inside them."""
    monkeypatch.setattr(conba_state, "CHUNK", 4)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)  # the same where the default is float64


def perturbed(module, seed=1):
    """Parameters that hide no bug: fresh ones are zero in many places."""
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, D)), make_sequence(1, 2)[0]))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def conba(case):
    module = Conba(**SIZES, **CASES[case])
    return module, perturbed(module)


def close(ours, reference, tolerance=2e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        error = np.linalg.norm(np.asarray(x) - np.asarray(want)) / max(np.linalg.norm(np.asarray(want)), 1e-6)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def equal(ours, reference):
    jax.tree.map(np.testing.assert_array_equal, ours, reference)


def sequence(segments=None, mask=None, segment=None, position=None, length=T):
    return make_sequence(B, length, segments, mask, segment, position)


def value_and_gradients(f, params, x, dtype):
    """f(params, x) [B, T, D], and gradients of a weighted sum of it, in a precision."""
    weights = draw(B, T, D, seed=7).astype(dtype)
    cast = lambda tree: jax.tree.map(lambda v: v.astype(dtype), tree)  # noqa: E731
    loss = lambda params, x: (jnp.sum(weights * (y := f(params, x))), y)  # noqa: E731
    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(cast(params), cast(x))
    return y, gradients


@every_case
def test_equals_the_equations_token_by_token(case):
    """Values, and gradients of inputs and parameters, of documents with padding on all sides and several chunks."""
    module, params = conba(case)
    x, seq = draw(B, T, D, seed=3), sequence(jnp.asarray(SEGMENTS), jnp.asarray(MASK))[0]
    got = value_and_gradients(
        lambda p, x: module.apply({"params": p}, x, seq)[0] * MASK[..., None], params, x, "float32"
    )
    options = {name: getattr(module, name) for name in module.options.fields}
    naive = lambda p, x: conba_reference.by_document(conba_reference.conba, p, x, SEGMENTS, MASK, options)  # noqa: E731
    with jax.enable_x64(True):
        want = value_and_gradients(naive, params, x, "float64")
    close(got[0], want[0])
    close(got[1], want[1], 2e-4)


@pytest.mark.parametrize("case", slow("open", "published", "input", "folded", "folded off"))
def test_pieces_equal_the_whole(case):  # the contract tests the default
    check_pieces(*conba(case))


def check_pieces(module, params):
    """With the state between them, in documents and with padding: outputs, and the last state."""
    x, segments, mask = draw(B, T, D, seed=3), jnp.asarray(SEGMENTS), jnp.asarray(MASK)

    @functools.partial(jax.jit, static_argnames="length")
    def apply(x, state, segments, mask, segment, position, length):
        seq, segment, position = sequence(segments, mask, segment, position, length)
        return *module.apply({"params": params}, x, seq, state), segment, position

    start = (segments[:, 0], jnp.zeros(B, jnp.int32))
    whole, last, *_ = apply(x, module.init_state(B), segments, mask, *start, T)
    ys, at, state = [], 0, module.init_state(B)
    for size in (4, 1, 1, 1, 4, 1, 1):
        piece = slice(at, at + size)
        y, state, *start = apply(x[:, piece], state, segments[:, piece], mask[:, piece], *start, size)
        ys.append(y)
        at += size
    close(jnp.concatenate(ys, axis=1)[MASK], whole[MASK])
    close(state, last)


@pytest.mark.parametrize("case", slow("folded", "input"))
def test_causal(case):
    module, params = conba(case)
    apply = jax.jit(lambda x: module.apply({"params": params}, x, sequence()[0])[0])
    x = draw(B, T, D)
    y, changed = apply(x), apply(x.at[:, 6].add(1.0))
    np.testing.assert_array_equal(y[:, :6], changed[:, :6])
    assert (np.abs(y - changed)[:, 6:].max(-1) > 1e-6).all()


@pytest.mark.parametrize("case", slow("open", "default", "input", "folded"))
def test_a_fresh_layer_is_mamba_with_the_norms_of_jamba(case):
    check_fresh(Conba(**SIZES, **CASES[case]))


def check_fresh(module):
    """Mamba's parameters under their own names, as in a checkpoint of Jamba, give Mamba's values and gradients."""
    mamba = Mamba(D, state=3, norms="learned", norm_eps=module.norm_eps, layers=2)
    x, seq = draw(B, T, D), sequence()[0]
    theirs = perturbed(mamba)
    fresh = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, seq))["params"]
    assert set(theirs) < set(fresh) and all(fresh[name].shape == theirs[name].shape for name in theirs)
    run = lambda module, more: lambda p, x: module.apply({"params": {**more, **p}}, x, seq)[0]  # noqa: E731
    want = value_and_gradients(run(mamba, {}), theirs, x, "float32")
    close(value_and_gradients(run(module, fresh), theirs, x, "float32"), want)


@functools.cache
def state_path():
    """Arguments of `read_states` for a sequence that is not short."""
    length, inner, rank, size = 37, 6, 2, 3
    shapes = dict(u=inner, delta=rank, B=size, C=size)
    reset = jnp.zeros((B, length), bool).at[:, 20].set(True).at[0, 3].set(True)
    tokens = Tokens(*(draw(B, length, n, seed=i) for i, n in enumerate(shapes.values())), reset)
    A, F, Z = -jnp.exp(draw(inner, size)), 0.4 * draw(size, size, seed=1), draw(size, size, seed=2)
    plant = Plant(
        A, draw(rank, inner, seed=4), draw(inner, seed=5), F, draw(size, seed=6), Z, draw(size, seed=7), delay=2
    )
    memory = Memory(*(draw(B, *s, inner, size, seed=8) for s in ((), (2,), ())))
    return tokens, plant, memory


@functools.cache
def read_in_chunks(chunk):
    def loss(tokens, plant, memory):
        y, before, memory = read_states(dataclass_with(tokens, "reset"), plant, memory, chunk=chunk)
        return jnp.sum(jnp.sin(y)) + jnp.sum(before**2) + sum(jnp.sum(x**2) for x in jax.tree.leaves(memory)), y

    tokens, plant, memory = state_path()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(tokens.replace(reset=None), plant, memory)


def dataclass_with(tokens, name):
    return tokens.replace(**{name: getattr(state_path()[0], name)})


@pytest.mark.parametrize("chunk", [1, 8, 37])
def test_chunks_of_any_size_compute_the_same(chunk):
    """Values and gradients of everything, the memory before and after included."""
    close(read_in_chunks(chunk), read_in_chunks(5), 1e-5)


# The gain


@pytest.mark.slow
def test_the_gain_stays_bounded():
    """65,536 steps, of errors that are random, and of errors that are nearly always the same."""
    length, size = 65_536, 64
    run = jax.jit(functools.partial(adapt, rule="nlms"))
    for same in (0.0, 10.0):
        e = draw(1, length, 1, size) + same * draw(size, seed=1)
        step = jax.nn.sigmoid(draw(1, length, 1, seed=2) - 2)
        memory = -jax.nn.softplus(draw(1, length, 1, seed=3) - 6)
        state = jnp.zeros((1, 1, size, size))
        corrected, state = run(e, jnp.zeros((1, size, size)), step, memory, state)
        assert np.linalg.norm(state[0, 0], 2) < 1.05
        assert np.all(np.linalg.norm(corrected, axis=-1) < 1.05 * np.linalg.norm(e, axis=-1))


def test_the_published_rule_is_linear_attention():
    """-K_t e_t = -K_0 e_t + eta sum_{s<t} (e_s . e_t) e_s: queries, keys and values are the errors."""
    length, heads, size, eta = 70, 2, 4, 0.03
    e, base = draw(B, length, heads, size), draw(heads, size, size, seed=1)
    start = jnp.zeros((B, heads, size, size))
    got, state = adapt(e, base, jnp.full((B, length, heads), eta), None, start, rule="published")
    e, base = np.asarray(e, np.float64), np.asarray(base, np.float64)
    scores = np.tril(np.einsum("bthp,bshp->bhts", e, e), -1)
    attention = np.einsum("bhts,bshp->bthp", scores, e)
    close(got, np.einsum("hpq,bthq->bthp", base, e) - eta * attention, 1e-5)
    close(state, -eta * np.einsum("bthp,bthq->bhpq", e, e), 1e-5)


def test_which_rule_makes_errors_smaller():
    """Errors that stay the same: the gradient's sign removes them, the published code's makes them larger."""
    e = jnp.broadcast_to(unit(draw(1, 1, 1, 8)), (1, 256, 1, 8))
    base, rate, start = jnp.zeros((1, 8, 8)), jnp.full((1, 256, 1), 0.01), jnp.zeros((1, 1, 8, 8))
    for rule, low, high in (("nlms", 0.05, 0.1), ("published", 3.5, 3.6)):
        learned, _ = adapt(e, base, rate, jnp.zeros_like(rate), start, rule=rule)
        assert low < jnp.linalg.norm((e - learned)[0, -1]) < high


# Noise


@pytest.mark.slow
def test_noise_is_in_training_only():
    noisy = Conba(**SIZES, scaling="off", control="off", process_noise=0.1, observation_noise=0.2)
    params, x, seq = perturbed(noisy), draw(B, T, D), sequence(None, jnp.asarray(MASK))[0]

    @functools.partial(jax.jit, static_argnames=("process", "observation"))
    def run(key, process, observation):
        module = noisy.clone(process_noise=process, observation_noise=observation)
        return module.apply({"params": params}, x, seq, rngs=None if key is None else {"dropout": key})

    key, quiet = jax.random.key(5), run(None, 0.0, 0.0)
    equal(run(None, 0.1, 0.2), quiet)
    equal(run(key, 0.0, 0.0), quiet)
    loud = run(key, 0.1, 0.2)
    assert np.abs(loud[0] - quiet[0])[MASK].min(-1).max() > 0 and (loud[0] == quiet[0])[~MASK].all()
    equal(run(key, 0.1, 0.2), loud)
    assert np.abs(run(jax.random.key(6), 0.1, 0.2)[0] - loud[0]).max() > 1e-3
    observed = run(key, 0.0, 0.2)
    equal(observed[1], quiet[1])  # it reaches no state
    twice = run(key, 0.2, 0.0)  # it enters linearly
    close(twice[1]["ssm"] - quiet[1]["ssm"], 2 * (run(key, 0.1, 0.0)[1]["ssm"] - quiet[1]["ssm"]), 1e-4)


def test_the_noise_on_the_state_has_its_size():
    """A state that forgets at once is the last token's noise alone."""
    tokens, plant, memory = state_path()
    plant = plant.replace(noise=0.3, A=jnp.full_like(plant.A, -1e9))
    tokens = tokens.replace(B=jnp.zeros_like(tokens.B), reset=None)
    run = jax.vmap(lambda key: read_states(tokens, plant, memory, key=key, chunk=8)[2].ssm)
    states = np.asarray(jax.jit(run)(jax.random.split(jax.random.key(0), 200)))
    assert abs(states.std() / 0.3 - 1) < 0.02 and abs(states.mean()) < 0.01


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(delay=-1), "delay=-1: must be at least 0"),
        (dict(head_dim=5), "head_dim=5: must be a divisor of expand * model.width = 16"),
        (dict(sweeps=2), "sweeps=2: must be 1, its default, unless model.conba.control='input'"),
        (dict(sweeps=0, control="input"), "sweeps=0: must be at least 1"),
        (dict(rule="mit"), "rule='mit': must be one of 'nlms', 'published'"),
        (dict(gain="inputs"), "gain='inputs': must be one of 'input', 'scalar'; did you mean 'input'?"),
        (dict(process_noise=-0.1), "process_noise=-0.1: must be at least 0"),
        (dict(state_eval="folded", scaling="literal"), "scaling='literal': must be 'gate' or 'off' with"),
        (dict(state_eval="folded", control="input"), "control='input': must be 'off' or 'output' with"),
        (dict(state_eval="folded", process_noise=0.1), "process_noise=0.1: must be 0 with"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError) as error:
        Conba(D, **dict(head_dim=4) | options)
    assert str(error.value).startswith(f"config.model.conba.{message}") and "\n" not in str(error.value)
