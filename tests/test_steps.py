"""The time between tokens, for every mixer that follows it: `Sequence.steps` and `config.model.rescale`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.branches import BRANCHES
from seqmodels.configs import mamba, s5, transformer
from seqmodels.data.times import steps_of
from seqmodels.errors import UserError
from seqmodels.mixers.bidirectional import Bidirectional
from seqmodels.model import build
from seqmodels.sequence import make_sequence, reversed_in_time
from tests.test_branches import QUICK, B, D, T, branch, close, draw, empty_state

FOLLOW = [name for name in BRANCHES if BRANCHES[name].follows_time == "token"]
followers = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FOLLOW]
)
STEPS = np.random.default_rng(5).uniform(0.2, 3, (B, T)).astype(np.float32)
CUT = 5  # where rows are cut: pieces and documents have these tokens, or as many others


@functools.partial(jax.jit, static_argnames=("name", "rescale"))
def compiled(name, params, x, steps, state, segment_ids, mask, segment, position, dy, rescale=1.0):
    """y, what the next call needs, and with steps the gradients of x and of the steps."""
    module, _ = branch(name)

    def run(x, steps):
        seq, *carry = make_sequence(*x.shape[:2], segment_ids, mask, segment, position, steps, rescale)
        y, new = module.apply(params, x, seq, state)
        return y, (new, *carry)

    if steps is None:
        return *run(x, None), None
    y, pull, carry = jax.vjp(run, x, steps, has_aux=True)
    return y, carry, pull(dy)


def call(name, x, steps, dy=None, start=None, segment_ids=None, mask=None, rescale=1.0):
    """All tests call the branch with the same arguments, so that few programs are compiled."""
    zeros = np.zeros(len(x), np.int32)
    state, segment, position = start or (empty_state(name), zeros, zeros)
    segment_ids = np.zeros(x.shape[:2], np.int32) if segment_ids is None else segment_ids
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    dy = np.zeros_like(x) if dy is None else dy
    _, params = branch(name)
    steps = None if steps is None else np.asarray(steps, np.float32)
    done = compiled(name, params, x, steps, state, segment_ids, mask, segment, position, dy, rescale)
    return jax.tree.map(np.asarray, done)


@followers
def test_steps_that_are_equal_are_a_factor(name):
    """Pieces with a factor each, one of them 1, are a row whose steps change where they meet."""
    x = draw((B, T, D))
    whole = call(name, x, np.where(np.arange(T) < CUT, 2, 1) * np.ones((B, 1)))
    first, start, _ = call(name, x[:, :CUT], None, rescale=2.0)
    second, last, _ = call(name, x[:, CUT:], None, start=start)
    close((np.concatenate([first, second], axis=1), last), whole[:2], 1e-4)
    assert np.abs(whole[0] - call(name, x, np.ones((B, T)))[0]).max() > 1e-3, "the steps do not matter"


@followers
def test_pieces_and_documents_keep_their_steps(name):
    """Whole = in pieces; packed, with padding that holds anything, = separate; in values and in gradients."""
    x, dy = draw((B, T, D)), draw((B, T, D), 1)
    y, last, _ = call(name, x, STEPS)
    first, start, _ = call(name, x[:, :CUT], STEPS[:, :CUT])
    second, end, _ = call(name, x[:, CUT:], STEPS[:, CUT:], start=start)
    close((np.concatenate([first, second], axis=1), end), (y, last), 1e-4)

    segments, mask = np.where(np.arange(T) < CUT, 3, 7) * np.ones((B, 1), int), np.ones((B, T), bool)
    mask[:, [2, 8]] = False
    spoilt, dy = np.where(mask, STEPS, np.nan), np.where(mask[..., None], dy, 0)
    packed, _, (dx, dsteps) = call(name, x, spoilt, dy, segment_ids=segments.astype(np.int32), mask=mask)
    parts = [call(name, x[:, at], spoilt[:, at], dy[:, at], mask=mask[:, at]) for at in (slice(CUT), slice(CUT, T))]
    real = lambda v: np.where(mask[..., None], v, 0)  # noqa: E731
    close(real(packed), real(np.concatenate([part[0] for part in parts], axis=1)), 1e-4)
    for ours, i in ((dx, 0), (dsteps, 1)):
        close(ours, np.concatenate([part[2][i] for part in parts], axis=1), 1e-4)
    assert np.all(dsteps[~mask] == 0)


@followers
def test_gradient_of_steps(name):
    """That of differences, in float64 sums, along a direction in which all steps change."""
    x, dy, direction = draw((B, T, D)), draw((B, T, D), 1), draw((B, T), 2)
    value = lambda steps: np.sum(call(name, x, steps, dy)[0].astype(np.float64) * dy)  # noqa: E731
    gradient = call(name, x, STEPS, dy)[2][1]
    assert np.isfinite(gradient).all()
    # errors of order h^2 cancel between h and 2 h; rounding is 1e-6 / h
    slope = lambda h: (value(STEPS + h * direction) - value(STEPS - h * direction)) / (2 * h)  # noqa: E731
    h = 1e-3 if name == "s4d" else 1e-2  # its fast states turn by a radian in a hundredth
    want = (4 * slope(h) - slope(2 * h)) / 3
    assert np.sum(gradient * direction) == pytest.approx(want, abs=1e-3 * float(np.sum(np.abs(gradient * direction))))


def at_rate(name, params, x, rescale):
    """y of another distance of the tokens, the same for all."""
    seq = make_sequence(*x.shape[:2], rescale=rescale)[0]
    return jax.jit(branch(name)[0].apply)(params, x, seq)[0]


@pytest.mark.slow
def test_retention_at_another_rate():
    """Where every other token writes nothing, retention reads what it reads without them at steps of 2."""
    _, params = branch("retnet")
    x = draw((B, T, D))
    between = np.stack([x, np.zeros_like(x)], axis=2).reshape(B, 2 * T, D)
    np.testing.assert_allclose(at_rate("retnet", params, between, 1.0)[:, ::2], at_rate("retnet", params, x, 2.0), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_state_spaces_at_another_rate(name):
    """dt is exp(log_dt), in the convolution and, from a state on, in the recurrence."""
    _, params = branch(name)
    x, own = draw((B, T, D)), params["params"]
    other = {"params": own | dict(log_dt=own["log_dt"] + np.log(0.25))}
    got = at_rate(name, params, x, 0.25)
    np.testing.assert_allclose(got, at_rate(name, other, x, 1.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(name, x, None, rescale=0.25)[0], got, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conba", "conba_seq"])
def test_conba_at_another_rate(name):
    """dt enters as dt A and dt B alone."""
    _, params = branch(name)
    x, own = draw((B, T, D)), params["params"]
    other = {"params": own | dict(A_log=own["A_log"] + np.log(0.25), B_norm=0.25 * own["B_norm"])}
    np.testing.assert_allclose(at_rate(name, params, x, 0.25), at_rate(name, other, x, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", pytest.param("s5", marks=pytest.mark.slow)])
def test_both_directions_have_their_own_steps(name):
    """The branch that reads backwards is given t_{k+1} - t_k: it is that branch on the reversed times."""
    times = np.cumsum(STEPS.astype(np.float64), axis=1)
    segments = np.where(np.arange(T) < CUT, 0, 1) * np.ones((B, 1), np.int32)
    mask = np.ones((B, T), bool)
    mask[0, 4] = False
    steps = steps_of(times, segments, mask)
    seq = make_sequence(B, T, segments.astype(np.int32), mask, steps=steps, rescale=0.5)[0]
    turned = lambda v: np.ascontiguousarray(v[:, ::-1])  # noqa: E731
    want = steps_of(-turned(times), turned(segments), turned(mask))
    np.testing.assert_allclose(np.where(turned(mask), reversed_in_time(seq).steps, 0), np.where(turned(mask), want, 0))
    module, params = branch(name)
    x = draw((B, T, D))
    both = Bidirectional(D, ahead=module.clone(parent=None), back=module.clone(parent=None))
    twice = {"params": dict(ahead=params["params"], back=params["params"])}
    y = jax.jit(both.apply)(twice, x, seq)[0]
    run = jax.jit(module.apply)
    ahead = run(params, x, seq)[0]
    other = make_sequence(B, T, turned(segments).astype(np.int32), turned(mask), steps=want, rescale=0.5)[0]
    back = run(params, turned(x), other)[0][:, ::-1]
    real = lambda v: np.where(mask[..., None], v, 0)  # noqa: E731
    np.testing.assert_allclose(real(y), real(ahead + back), rtol=1e-4, atol=1e-5)


def test_steps_of_times():
    times = np.array([[3.0, 5, 9, 9, 100, 101], [0, 7, 1, 2, 3, 1e9]])
    segments = np.array([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask = np.array([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0]], bool)
    steps = steps_of(times, segments, mask, unit=2)
    assert steps.dtype == np.float32
    np.testing.assert_array_equal(np.where(mask, steps, 0), [[1, 1, 0, 2, 1, 0.5], [1, 0, 0.5, 0.5, 0.5, 0]])
    late = 1.7e9 + np.array([[0, 0.25, 1.0]])  # seconds of a clock, which float32 would make equal
    np.testing.assert_array_equal(steps_of(late), [[1, 0.25, 0.75]])
    with pytest.raises(ValueError, match=r"times\[1, 2\]=1.0: must not be below that of the sample before"):
        steps_of(times)
    with pytest.raises(ValueError, match="unit=0: must be above 0"):
        steps_of(times, unit=0)


def test_who_cannot_follow_says_so():
    """Mixers without a step size, and positions that count tokens, before anything is compiled."""
    config = transformer.get_config().model.unlock()
    config.rescale = 2.0
    with pytest.raises(UserError, match=r"config.model.rescale=2.0: does not fit 'attention' in model.pattern, which"):
        build(config, 11)
    config.rescale = 1.0
    model = build(config, 11)
    tokens = jnp.zeros((B, T), jnp.int32)
    with pytest.raises(
        UserError, match=r"^steps: does not fit 'attention' in model.pattern, which does not follow time; "
    ):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, steps=jnp.ones((B, T))))
    config = mamba.get_config().model.unlock()
    config.update(positions="sinusoidal", rescale=0.5)
    with pytest.raises(UserError, match=r"rescale=0.5: does not fit model.positions='sinusoidal', which count tokens"):
        build(config, 11)
    alone, x = mixers.RetNet(width=D), jnp.zeros((B, T, D))
    with pytest.raises(UserError, match="steps: must be left out with RetNet, which has none for each token"):
        alone.init(jax.random.key(0), x, steps=jnp.ones((B, T)))


def test_a_model_reads_at_another_rate():
    """`model.rescale` and `steps` reach every block, also in a scan over layers and in decoding, token by token."""
    config = s5.get_config().model.unlock()
    config.update(pattern="s5", width=16, repeats=2, scan_blocks=1)
    tokens = np.random.default_rng(0).integers(0, 11, (B, T))
    model = build(config, 11)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    config.rescale = 2.0
    slower, run = build(config, 11), jax.jit(model.apply)
    want, _ = jax.jit(slower.apply)(variables, tokens)
    got, _ = run(variables, tokens, steps=np.full((B, T), 2, np.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - run(variables, tokens, steps=np.ones((B, T), np.float32))[0]).max() > 1e-3
    state, run = slower.init_state(B), jax.jit(slower.apply)
    for t in range(3):
        hidden, state = run(variables, tokens[:, t : t + 1], state=state)
    np.testing.assert_allclose(hidden[:, 0], want[:, 2], rtol=1e-4, atol=1e-5)
