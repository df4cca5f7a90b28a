"""The contract of branches, for every branch in the table: a new one gets these tests for free."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.mixers.bidirectional import Bidirectional
from seqmodels.pattern import BOTH_WAYS, name_of
from seqmodels.sequence import make_sequence
from seqmodels.training.sharding import AXES, RULES

B, T, D = 2, 10, 16


@functools.cache
def branch(name, dtype="float32"):
    """A small branch with perturbed parameters: fresh ones hide bugs. `name` is a word of the pattern language."""
    small = functools.partial(BRANCHES[name_of(name)], width=D, dtype=jnp.dtype(dtype), layers=2)
    if name.startswith(BOTH_WAYS):
        module = Bidirectional(D, jnp.dtype(dtype), ahead=small(parent=None), back=small(parent=None))
    else:
        module = small()
    seq, _, _ = make_sequence(B, T)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((B, T, D)), seq))  # once: kept by the cache
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    scale = lambda x: 0.25 if x.ndim > 1 else 0.1  # noqa: E731
    leaves = [x + scale(x) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(tree, leaves)


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 10), shape)


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def apply(name, params, x, state=None, segment_ids=None, mask=None, segment=None, position=None, dtype="float32"):
    """y, the new state, and the segment and position that the next call needs."""
    module, _ = branch(name, dtype)
    seq, segment, position = make_sequence(*x.shape[:2], segment_ids, mask, segment, position)
    y, state = module.apply(params, x, seq, state)
    return y, state, segment, position


def in_pieces(name, params, x, sizes, state, segment_ids=None, mask=None, segment=None, position=None):
    """The same as `apply` on the whole, piece by piece; y and the last state."""
    ys, start = [], 0
    if segment is None:  # so that no piece believes that nothing came before it
        segment = jnp.zeros(B, jnp.int32) if segment_ids is None else segment_ids[:, 0]
        position = jnp.zeros(B, jnp.int32)
    for size in sizes:
        cut = lambda v: None if v is None else v[:, start : start + size]  # noqa: B023, E731
        y, state, segment, position = apply(name, params, cut(x), state, cut(segment_ids), cut(mask), segment, position)
        ys.append(y)
        start += size
    return jnp.concatenate(ys, axis=1), state


def start_state(name, seed=3, room=0):
    """A state that is not zero: that after a few tokens. `room`: for how many tokens beside T more."""
    module, params = branch(name)
    _, state, segment, position = apply(name, params, draw((B, 3, D), seed), module.init_state(B, 3 + T + room))
    return state, segment, position


def close(ours, reference, tolerance=2e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        error = np.linalg.norm(np.asarray(x - want, np.float64)) / max(np.linalg.norm(np.asarray(want)), 1e-6)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


QUICK = ("attention", "mamba", "mlp")  # of make test-fast: a cache, a recurrence, a branch without a state


def marked(words):
    return [word if word in QUICK else pytest.param(word, marks=pytest.mark.slow) for word in words]


every_branch = pytest.mark.parametrize("name", marked(BRANCHES))
# One of each kind: what turns the tokens around is the same for all.
reversible = [BOTH_WAYS + name for name in ("attention", "linear_attention", "mamba", "mamba3")]
both_ways = pytest.mark.parametrize("name", marked([*BRANCHES, *reversible]))


@every_branch
def test_causal(name):
    _, params = branch(name)
    x = draw((B, T, D))
    y, *_ = apply(name, params, x)
    changed, *_ = apply(name, params, x.at[:, 6].add(1.0))
    np.testing.assert_array_equal(y[:, :6], changed[:, :6])
    differ = np.abs(y[:, 6:] - changed[:, 6:]).max(-1) > 1e-6
    remembers = jax.tree.leaves(branch(name)[0].init_state(B, T))
    assert np.all(differ if remembers else differ[:, :1]), "an output does not depend on token 6"


@every_branch
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("sizes", [(4, 1, 5), (1,) * T])
def test_whole_equals_pieces_from_any_state(name, sizes, started):
    module, params = branch(name)
    x = draw((B, T, D))
    state, segment, position = start_state(name) if started else (module.init_state(B, 3 + T), None, None)
    y, last, *_ = apply(name, params, x, state, segment=segment, position=position)
    pieces, last_of_pieces = in_pieces(name, params, x, sizes, state, segment=segment, position=position)
    close((pieces, last_of_pieces), (y, last))
    if not started:
        close(apply(name, params, x)[0], y)  # no state is the empty state


@every_branch
def test_state_has_batch_first_and_constant_structure(name):
    module, params = branch(name)
    state = module.init_state(B, T)
    _, new, *_ = apply(name, params, draw((B, 1, D)), state)
    assert all(x.shape[0] == B for x in jax.tree.leaves(state))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new)


SEGMENTS = np.array([[0] * 4 + [1] * 1 + [2] * 5, [5] * 7 + [3] * 3], np.int32)


@both_ways
def test_packed_documents_equal_separate_ones(name):
    """In value and in gradient, of the input and of every parameter."""
    _, params = branch(name)
    x, weights = draw((B, T, D)), draw((B, T, D), 1)

    def packed(params, x):
        return apply(name, params, x, segment_ids=jnp.asarray(SEGMENTS))[0]

    def separate(params, x):
        out = jnp.zeros_like(x)
        for row in range(B):
            for document in np.unique(SEGMENTS[row]):
                at = np.flatnonzero(SEGMENTS[row] == document)
                out = out.at[row, at].set(apply(name, params, x[row : row + 1, at])[0][0])
        return out

    def value_and_gradients(f):
        loss = lambda *a: (jnp.sum(weights * (y := f(*a))), y)  # noqa: E731
        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return y, gradients

    (y, gradients), (want, want_gradients) = value_and_gradients(packed), value_and_gradients(separate)
    close(y, want)
    close(gradients, want_gradients, 1e-4)


@every_branch
def test_packed_pieces_equal_whole(name):
    module, params = branch(name)
    x, segments = draw((B, T, D)), jnp.asarray(SEGMENTS)
    y, *_ = apply(name, params, x, module.init_state(B, T), segments)
    pieces, _ = in_pieces(name, params, x, (3, 1, 4, 2), module.init_state(B, T), segments)
    close(pieces, y)


PADDING = {
    "left": [[0] * 3 + [1] * 7, [0] * 1 + [1] * 9],
    "right": [[1] * 7 + [0] * 3, [1] * 9 + [0] * 1],
    "interior": [[1, 0, 1, 1, 0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]],
}


@every_branch
@pytest.mark.parametrize("side", PADDING)
def test_padding_is_nothing(name, side):
    """Tokens, states and gradients are those of the row without its padding, whatever the padding holds."""
    module, params = branch(name)
    mask = np.asarray(PADDING[side], bool)
    x, weights = draw((B, T, D)), draw((B, T, D), 1)
    poisoned = jnp.where(mask[..., None], x, jnp.nan)

    def padded(params, x):
        y, state, *_ = apply(name, params, x, module.init_state(B, T), mask=jnp.asarray(mask))
        return jnp.where(mask[..., None], y, 0), state

    def bare(params, x):
        rows = [apply(name, params, x[r : r + 1, m], module.init_state(1, T))[:2] for r, m in enumerate(mask)]
        y = jnp.zeros_like(x)
        for r, m in enumerate(mask):
            y = y.at[r, np.flatnonzero(m)].set(rows[r][0][0])
        return y, jax.tree.map(lambda *s: jnp.concatenate(s), *[s for _, s in rows])

    def value_and_gradient(f, x):
        loss = lambda p: (jnp.sum(weights * (out := f(p, x))[0]), out)  # noqa: E731
        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        return out, gradient

    (out, gradient), (want, want_gradient) = value_and_gradient(padded, poisoned), value_and_gradient(bare, x)
    close(out, want)
    close(gradient, want_gradient, 1e-4)


ISOLATED = np.array([[0] * 4 + [1] * 3 + [2] * 3, [3] * 2 + [4] * 3 + [5] * 5], np.int32)
BAD = np.isin(ISOLATED, [1, 4])  # documents that are not finite
REAL = np.array([[1] * 8 + [0] + [1], [0] + [1] * 9], bool)


@both_ways
def test_what_is_not_finite_stays_in_its_document(name):
    """A document, padding and a state that a new document drops hold NaN and infinity: all others are as without.

    In values, also of the next token, and in gradients of the inputs. The first row goes on with its state's document.
    """
    _, params = branch(name)
    x, weights, following = draw((B, T, D)), draw((B, T, D), 1), draw((B, 1, D), 2)
    state, segment, position = (None, None, None) if name.startswith(BOTH_WAYS) else start_state(name, room=1)
    if state is not None:
        segment = jnp.array([0, 9], jnp.int32)

    @jax.jit
    def run(x, state, weights):
        def f(x):
            y, *after = apply(name, params, x, state, jnp.asarray(ISOLATED), jnp.asarray(REAL), segment, position)
            return y, after

        y, pull, after = jax.vjp(f, x, has_aux=True)
        return y, *pull(weights), after

    spoil = lambda v, where: jnp.where(where[..., None], jnp.where(jnp.arange(D) % 2, jnp.nan, jnp.inf), v)  # noqa: E731
    of_row = lambda v: v.at[1].set(jnp.nan) if jnp.issubdtype(v.dtype, jnp.floating) else v  # noqa: E731
    want_y, want_dx, want_after = run(x, state, weights)
    y, dx, after = run(spoil(x, BAD | ~REAL), jax.tree.map(of_row, state), jnp.where(BAD[..., None], jnp.nan, weights))
    good = REAL & ~BAD
    close((y[good], dx[good]), (want_y[good], want_dx[good]), 1e-5)
    assert not np.isfinite(y[BAD & REAL]).all()
    if state is not None:
        step = lambda after: apply(name, params, following, after[0], ISOLATED[:, -1:], None, *after[1:])[0]  # noqa: E731
        close(step(after), step(want_after), 1e-5)


@every_branch
def test_state_is_differentiable_in_and_out(name):
    """Gradients through a cut equal those of the whole, in the input, the parameters and the first state."""
    _, params = branch(name)
    x, weights = draw((B, T, D)), draw((B, T, D), 1)
    state, segment, position = start_state(name)
    floats = lambda s: [v for v in jax.tree.leaves(s) if jnp.issubdtype(v.dtype, jnp.floating)]  # noqa: E731

    def loss(run):
        def f(params, x, values):
            leaves, tree = jax.tree.flatten(state)
            values = iter(values)
            full = [next(values) if jnp.issubdtype(v.dtype, jnp.floating) else v for v in leaves]
            y, last = run(params, x, jax.tree.unflatten(tree, full))
            return jnp.sum(weights * y) + sum(jnp.sum(v**2) for v in floats(last))

        return jax.jit(jax.grad(f, argnums=(0, 1, 2)))(params, x, floats(state))

    whole = loss(lambda p, x, s: apply(name, p, x, s, segment=segment, position=position)[:2])
    cut = loss(lambda p, x, s: in_pieces(name, p, x, (4, 6), s, segment=segment, position=position))
    close(cut, whole, 1e-4)
    assert all(np.abs(g).max() > 0 for g in whole[2]), "some of the state does not matter"


@every_branch
def test_bfloat16(name):
    _, params = branch(name)
    x = draw((B, T, D))
    y, *_ = apply(name, params, x)
    half, *_ = apply(name, params, x.astype(jnp.bfloat16), dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), y, 3e-2)
    assert y.dtype == jnp.float32


@every_branch
@pytest.mark.parametrize("other", ["tensor", "sequence"])
def test_sharded_equals_unsharded(name, other):
    """Values and gradients on 8 devices, rows over one axis, channels or time over the other."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    module, params = branch(name)
    sizes = {"data": 2, other: 4}
    mesh = jax.make_mesh([sizes.get(axis, 1) for axis in AXES], AXES, axis_types=(AxisType.Auto,) * len(AXES))
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((B, T, D)), make_sequence(B, T)[0])
    rules = dict(inner="tensor", heads="tensor", kv_heads="tensor")
    specs = jax.tree.map(lambda s: P(*(rules.get(n) for n in s)), nn.get_partition_spec(boxed))
    length = 16
    x = draw((4, length, D))
    segments = jnp.asarray(np.repeat(np.arange(4), 4)[None].repeat(4, 0) + np.arange(4)[:, None], jnp.int32)

    def f(params, x):
        y, state, *_ = apply(name, params, x, segment_ids=segments)
        return jnp.sum(jnp.sin(y)), (y, state)

    step = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
    want = step(params, x)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        put = lambda v, s: jax.device_put(v, NamedSharding(mesh, s))  # noqa: E731
        divides = lambda v, s: s if all(a is None or n % 4 == 0 for n, a in zip(v.shape, s, strict=False)) else P()  # noqa: E731
        sharded = jax.tree.map(lambda v, s: put(v, divides(v, s)), params, specs)
        got = step(sharded, put(x, P("data", "sequence", None)))
    close(got, want, 1e-4)


def test_a_branch_in_both_directions_is_its_two_copies():
    """One on the tokens as they are, the other on the reversed ones."""
    module, params = branch("bi:mamba")
    x = draw((B, T, D))
    y, state, *_ = apply("bi:mamba", params, x)
    one = lambda way, x: apply("mamba", {"params": params["params"][way]}, x)[0]  # noqa: E731
    close(y, one("ahead", x) + one("back", x[:, ::-1])[:, ::-1])
    assert not jax.tree.leaves(state)
    with pytest.raises(UserError, match="'bi:' reads both directions of time and has no state"):
        module.init_state(B, T)


@pytest.mark.parametrize(
    "side", [pytest.param(side, marks=pytest.mark.slow) if side != "interior" else side for side in PADDING]
)
def test_padding_is_nothing_in_both_directions(side):
    """Values and gradients, whatever the padding holds."""
    _, params = branch("bi:mamba")
    mask = np.asarray(PADDING[side], bool)
    x, weights = draw((B, T, D)), draw((B, T, D), 1)

    def padded(params, x):
        y = apply("bi:mamba", params, jnp.where(mask[..., None], x, jnp.nan), mask=jnp.asarray(mask))[0]
        return jnp.sum(jnp.where(mask[..., None], weights * y, 0))

    def bare(params, x):
        rows = [weights[r, m] * apply("bi:mamba", params, x[r : r + 1, m])[0][0] for r, m in enumerate(mask)]
        return sum(jnp.sum(row) for row in rows)

    grads = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x) for f in (padded, bare)]
    close(*grads, 1e-4)
