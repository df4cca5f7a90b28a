"""The contract of branches, for every branch in the table: a new one gets these tests for free."""

import functools
import re
from typing import Any, NamedTuple

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
from seqmodels.mixers.short_conv import ShortConv
from seqmodels.pattern import BOTH_WAYS, name_of
from seqmodels.sequence import make_sequence
from seqmodels.training.collectives import collectives
from seqmodels.training.sharding import AXES, RULES

B, T, D = 2, 10, 16
PARTS = {"short_conv": ShortConv}  # of a block, no words of the pattern language


@functools.cache
def branch(name, dtype="float32"):
    """A small branch with perturbed parameters: fresh ones hide bugs. `name` is a word of the pattern language."""
    kind = PARTS.get(name) or BRANCHES[name_of(name)]
    small = functools.partial(kind, width=D, dtype=jnp.dtype(dtype), layers=2)
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
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Call(NamedTuple):
    """What one call of a branch gives, in arrays of NumPy: those of JAX would be cut and joined by compiled programs.

    Attributes:
        y: [B, T, D]. state: the new one.
        segment, position: of the last tokens, [B]: arguments of the next call.
        gradients: of the parameters, of x and of the numbers of the old state, from those of y and of the new state.
    """

    y: np.ndarray
    state: Any
    segment: np.ndarray
    position: np.ndarray
    gradients: tuple[Any, np.ndarray, list[np.ndarray]] | None


def numbers(state):
    """The leaves of a state that have a gradient."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def with_numbers(state, values):
    """The state with other numbers."""
    leaves, tree = jax.tree.flatten(state)
    values = iter(values)
    return jax.tree.unflatten(tree, [next(values) if jnp.issubdtype(v.dtype, jnp.floating) else v for v in leaves])


@functools.partial(jax.jit, static_argnames=("name", "dtype", "backward"))
def compiled(name, params, x, dy, state, dlast, segment_ids, mask, segment, position, dtype, backward):
    module, _ = branch(name, dtype)

    def run(params, x, values):
        seq, *carry = make_sequence(*x.shape[:2], segment_ids, mask, segment, position)
        y, new = module.apply(params, x, seq, with_numbers(state, values))
        return (y, numbers(new)), (new, *carry)

    if not backward:
        (y, _), carry = run(params, x, numbers(state))
        return Call(y, *carry, None)
    (y, values), pull, carry = jax.vjp(run, params, x, numbers(state), has_aux=True)
    return Call(y, *carry, pull((dy, [jnp.zeros_like(v) for v in values] if dlast is None else dlast)))


def call(
    name,
    params,
    x,
    dy=None,
    state=None,
    dlast=None,
    *,
    segment_ids=None,
    mask=None,
    segment=None,
    position=None,
    dtype="float32",
    backward=True,
):
    """A branch on tokens, forward and backward. All tests call it in the same few forms, which are compiled once.

    Args:
        dy, dlast: gradients of y and of the numbers of the new state; None: zeros.
        backward: False where no test needs the gradients of this form: it is compiled in half the time.
    """
    dy = np.zeros_like(x) if dy is None else dy
    if state is not None:
        dlast = jax.tree.map(np.zeros_like, numbers(state)) if dlast is None else dlast
        if segment is None:
            segment, position = np.zeros(len(x), np.int32), np.zeros(len(x), np.int32)
    done = compiled(name, params, x, dy, state, dlast, segment_ids, mask, segment, position, dtype, backward)
    return jax.tree.map(np.asarray, done)


def in_pieces(
    name, params, x, sizes, state, dy=None, dlast=None, segment=None, position=None, backward=True, **documents
):
    """`call` on pieces of these sizes, one after the other: y, the last state, and the gradients from the last to the
    first piece."""
    ends = np.cumsum(sizes)
    cuts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    cut = lambda at: dict({k: v[:, at] for k, v in documents.items()}, segment=segment, position=position)  # noqa: E731
    ys, before = [], []
    for at in cuts:
        before.append((state, cut(at)))
        y, state, segment, position, _ = call(name, params, x[:, at], None, state, **before[-1][1], backward=backward)
        ys.append(y)
    y = np.concatenate(ys, axis=1)
    if dy is None:
        return y, state, None
    total, dxs = None, []
    for at, (old, options) in zip(reversed(cuts), reversed(before), strict=True):
        dparams, dx, dlast = call(name, params, x[:, at], dy[:, at], old, dlast, **options).gradients
        total = dparams if total is None else jax.tree.map(np.add, total, dparams)
        dxs.insert(0, dx)
    return y, state, (total, np.concatenate(dxs, axis=1), dlast)


def apart(name, params, x, dy, documents, state=None):
    """Documents each in a call of its own: y, the sum of the gradients of the parameters, and the gradient of x.

    Args:
        documents: pairs of a row and its tokens.
        state: the state before the first token. None: the calls have none.

    Returns also the new states, one for each document.
    """
    y, dx, total, states = np.zeros_like(x), np.zeros_like(x), None, []
    for row, at in documents:
        both = lambda v: np.stack([v[row, at], np.zeros_like(v[row, at])])  # noqa: B023, E731 (two rows, as elsewhere)
        done = call(name, params, both(x), both(dy), state)
        dparams, dx_here, _ = done.gradients
        y[row, at], dx[row, at] = done.y[0], dx_here[0]
        total = dparams if total is None else jax.tree.map(np.add, total, dparams)
        states.append(jax.tree.map(lambda v: v[0], done.state))
    return y, (total, dx), states


def empty_state(name):
    """The state before the first token, with room for T more after those of `start_state`."""
    return jax.tree.map(np.asarray, branch(name)[0].init_state(B, 4 + T))


def start_state(name, seed=3):
    """A state that is not zero: that after a few tokens."""
    first = call(name, branch(name)[1], draw((B, 4, D), seed), None, empty_state(name))
    return dict(state=first.state, segment=first.segment, position=first.position)


def close(ours, reference, tolerance=2e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        error = np.linalg.norm(np.asarray(x - want, np.float64)) / max(np.linalg.norm(np.asarray(want)), 1e-6)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


QUICK = ("attention", "mamba", "mlp")  # of make test-fast: a cache, a recurrence, a branch without a state


def marked(words):
    return [word if word in QUICK else pytest.param(word, marks=pytest.mark.slow) for word in words]


every_branch = pytest.mark.parametrize("name", marked([*BRANCHES, *PARTS]))
# One of each kind: what turns the tokens around is the same for all.
reversible = [BOTH_WAYS + name for name in ("attention", "linear_attention", "mamba", "mamba3")]
both_ways = pytest.mark.parametrize("name", marked([*BRANCHES, *PARTS, *reversible]))

# Pieces and documents have 4 tokens or 1: whatever the order, two programs do for all.
PIECES = (4, 1, 1, 4)
DOCUMENTS = [
    (0, slice(0, 4)),
    (0, slice(4, 5)),
    (0, slice(5, 6)),
    (0, slice(6, 10)),
    (1, slice(0, 1)),
    (1, slice(1, 5)),
    (1, slice(5, 9)),
    (1, slice(9, 10)),
]
SEGMENTS = np.array([[0] * 4 + [1] + [2] + [3] * 4, [7] + [5] * 4 + [4] * 4 + [6]], np.int32)


SHORT = {"rwkv_channel": 2}  # outputs that a token reaches, of branches that remember few tokens


@every_branch
def test_causal(name):
    _, params = branch(name)
    x = draw((B, T, D))
    y = call(name, params, x, backward=False).y
    after = np.arange(T) == 6
    changed = call(name, params, x + after[:, None].astype(np.float32), backward=False).y
    np.testing.assert_array_equal(y[:, :6], changed[:, :6])
    differ = np.abs(y[:, 6:] - changed[:, 6:]).max(-1) > 1e-6
    remembers = jax.tree.leaves(empty_state(name))
    reach = SHORT.get(name, T if remembers else 1)
    assert np.all(differ[:, :reach]), "an output does not depend on token 6"


@every_branch
def test_whole_equals_pieces_from_any_state(name):
    """In value and in gradient, of the input, of the parameters and of the first state."""
    _, params = branch(name)
    x, dy = draw((B, T, D)), draw((B, T, D), 1)
    fresh = dict(state=empty_state(name))
    close(call(name, params, x, backward=False).y, call(name, params, x, **fresh).y)  # no state is the empty state
    for start in (fresh, start_state(name)):
        dlast = jax.tree.map(lambda v: draw(v.shape, 4), numbers(start["state"]))
        whole = call(name, params, x, dy, dlast=dlast, **start)
        y, last, gradients = in_pieces(name, params, x, PIECES, dy=dy, dlast=dlast, **start)
        close((y, last), (whole.y, whole.state))
        close(gradients, whole.gradients, 1e-4)
        close(in_pieces(name, params, x, (1,) * T, **start)[:2], (whole.y, whole.state))
    assert all(np.abs(g).max() > 0 for g in gradients[2]), "some of the state does not matter"


@every_branch
def test_state_has_batch_first_and_constant_structure(name):
    state = empty_state(name)
    new = call(name, branch(name)[1], draw((B, 1, D)), None, state).state
    assert all(x.shape[0] == B for x in jax.tree.leaves(state))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new)


@both_ways
def test_packed_documents_equal_separate_ones(name):
    """In value and in gradient, of the input and of every parameter."""
    _, params = branch(name)
    x, dy = draw((B, T, D)), draw((B, T, D), 1)
    packed = call(name, params, x, dy, segment_ids=SEGMENTS)
    fresh = None if name.startswith(BOTH_WAYS) else empty_state(name)
    y, gradients, _ = apart(name, params, x, dy, DOCUMENTS, fresh)
    close(packed.y, y)
    close(packed.gradients[:2], gradients, 1e-4)


@every_branch
def test_packed_pieces_equal_whole(name):
    _, params = branch(name)
    x, documents = draw((B, T, D)), dict(segment_ids=SEGMENTS, mask=np.ones((B, T), bool))
    start = dict(state=empty_state(name), segment=SEGMENTS[:, 0], position=np.zeros(B, np.int32))
    y, _, _ = in_pieces(name, params, x, PIECES, **start, **documents, backward=False)
    close(y, call(name, params, x, segment_ids=SEGMENTS).y)


PADDING = {  # real tokens of a row: 4 and 1, pieces of these sizes are compiled for other tests
    "left": [[0] * 6 + [1] * 4, [0] * 9 + [1]],
    "right": [[1] * 4 + [0] * 6, [1] + [0] * 9],
    "interior": [[1, 0, 1, 1, 0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0, 1, 0, 1, 0]],
}


@every_branch
@pytest.mark.parametrize("side", PADDING)
def test_padding_is_nothing(name, side):
    """Tokens, states and gradients are those of the row without its padding, whatever the padding holds."""
    _, params = branch(name)
    mask = np.asarray(PADDING[side], bool)
    x, dy = draw((B, T, D)), np.where(mask[..., None], draw((B, T, D), 1), 0)
    poisoned, fresh, zeros = np.where(mask[..., None], x, np.nan), empty_state(name), np.zeros(B, np.int32)
    documents = dict(mask=mask, segment_ids=np.zeros((B, T), np.int32), segment=zeros, position=zeros)
    padded = call(name, params, poisoned, dy, fresh, **documents)
    y, (dparams, _), states = apart(name, params, x, dy, [(r, np.flatnonzero(m)) for r, m in enumerate(mask)], fresh)
    real = lambda v: np.where(mask[..., None], v, 0)  # noqa: E731
    close((real(padded.y), padded.state), (y, jax.tree.map(lambda *s: np.stack(s), *states)))
    close(padded.gradients[0], dparams, 1e-4)
    if side == "right":  # without documents too
        close(real(call(name, params, poisoned, mask=mask, backward=False).y), y)


ISOLATED = np.array([[0] * 4 + [1] * 3 + [2] * 3, [3] * 2 + [4] * 3 + [5] * 5], np.int32)
BAD = np.isin(ISOLATED, [1, 4])  # documents that are not finite
REAL = np.array([[1] * 8 + [0] + [1], [0] + [1] * 9], bool)
SPOILT = np.where(np.arange(D) % 2, np.nan, np.inf).astype(np.float32)


@both_ways
def test_what_is_not_finite_stays_in_its_document(name):
    """A document, padding and a state that a new document drops hold NaN and infinity: all others are as without.

    In values, also of the next token, and in gradients of the inputs. The first row goes on with its state's document.
    """
    _, params = branch(name)
    x, dy, following = draw((B, T, D)), draw((B, T, D), 1), draw((B, 1, D), 2)
    documents, start = dict(segment_ids=ISOLATED, mask=REAL), {}
    if not name.startswith(BOTH_WAYS):
        start = start_state(name) | dict(segment=np.array([0, 9], np.int32))

    def run(x, dy, **start):
        return call(name, params, x, dy, **start, **documents)

    spoil = lambda v, where: np.where(where[..., None], SPOILT, v)  # noqa: E731
    of_row = lambda v: np.concatenate([v[:1], np.full_like(v[1:], np.nan)]) if v.dtype.kind == "f" else v  # noqa: E731
    want = run(x, dy, **start)
    if start:
        start |= dict(state=jax.tree.map(of_row, start["state"]))
    got = run(spoil(x, BAD | ~REAL), spoil(dy, BAD), **start)
    good = REAL & ~BAD
    close((got.y[good], got.gradients[1][good]), (want.y[good], want.gradients[1][good]), 1e-5)
    assert not np.isfinite(got.y[BAD & REAL]).all()
    if start:
        ids = dict(segment_ids=ISOLATED[:, -1:], mask=np.ones((B, 1), bool), backward=False)

        def step(c):
            return call(name, params, following, None, c.state, segment=c.segment, position=c.position, **ids).y

        close(step(got), step(want), 1e-5)


@every_branch
def test_bfloat16(name):
    _, params = branch(name)
    x = draw((B, T, D))
    y = call(name, params, x, backward=False).y
    half = call(name, params, x.astype(jnp.bfloat16), dtype="bfloat16").y
    assert half.dtype == jnp.bfloat16
    close(half.astype(np.float32), y, 3e-2)
    assert y.dtype == jnp.float32


# Branches that send more than states and halos over the axis `sequence`, and what.
WHOLE_ROWS = {
    "attention": "all-to-all",  # heads for pieces of time, and back
    **dict.fromkeys(("gru", "lstm", "rwkv", "conba_seq"), "all-gather"),  # loops over tokens
    **dict.fromkeys(("h3", "hyena", "s4", "s4d"), "all-gather"),  # convolutions as long as the row
    "moe": "all-gather",  # logits of the router, by XLA's top_k
    **dict.fromkeys(("cnn", "conba", "mamba3"), "all-to-all"),  # how XLA shifts an array in time
}


# These send states and halos alone. A branch that is in neither list, such as one of your own, may send whole rows.
LOCAL = (
    "deltanet", "gated_deltanet", "gla", "hgrn", "linear_attention", "mamba", "mamba2", "mingru", "minlstm", "mlp",
    "performer", "retnet", "rglru", "rwkv_channel", "s5",
)  # fmt: skip


def sent_in_time(program, mesh):
    """Kinds of the collectives that move numbers of tokens over the axis `sequence`: T of them, or a piece's T / 2."""
    moved = [c for c in collectives(program.as_text(), mesh) if "sequence" in c.axes]
    shapes = lambda c: [each.split(",") for each in re.findall(r"f(?:32|16|64)\[([\d,]*)\]", c.arrays)]  # noqa: E731
    return {c.kind for c in moved if any({str(T), str(T // 2)} & set(shape) for shape in shapes(c))}


@every_branch
def test_sharded_equals_unsharded(name):
    """Values, states and gradients on 8 devices, which share rows, channels and time, and gather matrices. A document
    is on several. Along time devices send each other states and halos, but for the branches that say otherwise."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    module, params = branch(name)
    x, dy = draw((B, T, D)), draw((B, T, D), 1)
    want = call(name, params, x, dy, segment_ids=ISOLATED)
    sizes = {"fsdp": 2, "tensor": 2, "sequence": 2}
    mesh = jax.make_mesh([sizes.get(axis, 1) for axis in AXES], AXES, axis_types=(AxisType.Auto,) * len(AXES))
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((B, T, D)), make_sequence(B, T)[0])
    rules = dict(inner="tensor", heads="tensor", kv_heads="tensor", embed="fsdp")
    specs = jax.tree.map(lambda s: P(*(rules.get(n) for n in s)), nn.get_partition_spec(boxed))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        put = lambda v, s: jax.device_put(v, NamedSharding(mesh, s))  # noqa: E731
        divides = lambda v, s: s if all(a is None or n % 2 == 0 for n, a in zip(v.shape, s, strict=False)) else P()  # noqa: E731
        sharded = jax.tree.map(lambda v, s: put(v, divides(v, s)), params, specs)
        rows = [put(v, P("fsdp", "sequence", None)) for v in (x, dy)]
        arrays = (sharded, *rows, None, None, put(ISOLATED, P("fsdp", "sequence")), None, None, None)
        program = compiled.lower(name, *arrays, "float32", True).compile()
        got = jax.tree.map(np.asarray, program(*arrays))
    close(got, want, 1e-4)
    sent = sent_in_time(program, mesh)
    assert name not in WHOLE_ROWS or WHOLE_ROWS[name] in sent
    assert name not in LOCAL or not sent


def test_a_branch_in_both_directions_is_its_two_copies():
    """One on the tokens as they are, the other on the reversed ones."""
    module, params = branch("bi:mamba")
    x = draw((B, T, D))
    y, state, *_ = call("bi:mamba", params, x, backward=False)
    one = lambda way, x: call("mamba", {"params": params["params"][way]}, x, backward=False).y  # noqa: E731
    close(y, one("ahead", x) + one("back", x[:, ::-1])[:, ::-1])
    assert not jax.tree.leaves(state)
    with pytest.raises(UserError, match="'bi:' reads both directions of time and has no state"):
        module.init_state(B, T)


@pytest.mark.parametrize("side", PADDING)
def test_padding_is_nothing_in_both_directions(side):
    """Values and gradients, whatever the padding holds."""
    _, params = branch("bi:mamba")
    mask = np.asarray(PADDING[side], bool)
    x, dy = draw((B, T, D)), np.where(mask[..., None], draw((B, T, D), 1), 0)
    padded = call("bi:mamba", params, np.where(mask[..., None], x, np.nan), dy, mask=mask)
    y, gradients, _ = apart("bi:mamba", params, x, dy, [(r, np.flatnonzero(m)) for r, m in enumerate(mask)])
    real = lambda v: np.where(mask[..., None], v, 0)  # noqa: E731
    close((real(padded.y), padded.gradients[0], real(padded.gradients[1])), (y, *gradients), 1e-4)
