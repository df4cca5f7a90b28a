"""LSTM and GRU against torch.nn.LSTM and GRU in float64, with all of torch's parameters drawn anew.

Measured: outputs, states and gradients differ by at most 1e-6 of their norm.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers.gru import Gru
from seqmodels.mixers.lstm import Lstm
from seqmodels.sequence import make_sequence

torch = pytest.importorskip("torch")

B, D, E = 2, 5, 6
LENGTHS = {"unrolled": 5, "in a loop": 17}
KINDS = {"lstm": (Lstm, 4, ("h", "c")), "gru": (Gru, 3, ("h",))}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def near(ours, theirs, tolerance=3e-6):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def ours_of(theirs, out):
    """Our parameters for torch's, by name: gates [G E, D] become [D, G, E]."""
    gates = len(theirs["bias_ih_l0"]) // E
    matrix = lambda name: np.moveaxis(theirs[name].reshape(gates, E, -1), 2, 0)  # noqa: E731
    bias, other = (theirs[name].reshape(gates, E) for name in ("bias_hh_l0", "bias_ih_l0"))
    ours = dict(in_proj=matrix("weight_ih_l0"), recurrent=matrix("weight_hh_l0"), out_proj=out)
    if gates == 4:
        return ours | dict(bias=bias + other)
    apart = np.arange(3)[:, None] == 2
    return ours | dict(bias=bias + np.where(apart, 0, other), candidate_bias=other[2])


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", KINDS)
def test_torch(name, length):
    """y, the last state, and the gradients of the input, of every parameter and of the first state."""
    kind, gates, leaves = KINDS[name]
    theirs = getattr(torch.nn, name.upper())(D, E, batch_first=True).double()
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(torch.from_numpy(0.6 * draw(*p.shape, seed=i)))
    out, x, dy = draw(E, D, seed=9), draw(B, length, D, seed=10), draw(B, length, D, seed=11)
    state = {leaf: draw(B, E, seed=12 + i) for i, leaf in enumerate(leaves)}
    dlast = {leaf: draw(B, E, seed=14 + i) for i, leaf in enumerate(leaves)}

    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in dict(x=x, out=out, **state).items()}
    first = [tensors[leaf][None] for leaf in leaves]
    h, last = theirs(tensors["x"], tuple(first) if gates == 4 else first[0])
    last = {leaf: s[0] for leaf, s in zip(leaves, last if gates == 4 else [last], strict=True)}
    y = h @ tensors["out"]
    loss = (y * torch.tensor(dy)).sum() + sum((last[leaf] * torch.tensor(dlast[leaf])).sum() for leaf in leaves)
    loss.backward()
    values = {k: p.detach().numpy() for k, p in theirs.named_parameters()}
    gradients = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    if gates == 4:  # the gradient of a sum is that of each summand
        gradients["bias_ih_l0"] = 0 * gradients["bias_ih_l0"]
    else:
        gradients["bias_ih_l0"][: 2 * E] = 0
    wanted = {k: tensors[k].grad.numpy() for k in ("x", "out", *leaves)}
    want = ours_of(gradients, wanted["out"]), wanted["x"], {leaf: wanted[leaf] for leaf in leaves}

    module = kind(width=D, hidden=E)
    seq = make_sequence(B, length)[0]
    float32 = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))

    @jax.jit
    def ours(params, x, state):
        results, pull = jax.vjp(lambda p, x, s: module.apply({"params": p}, x, seq, s), params, x, state)
        return results, pull(float32((dy, dlast)))

    (got, new), grads = ours(*float32((ours_of(values, out), x, state)))
    near((got, new), (y.detach().numpy(), {leaf: s.detach().numpy() for leaf, s in last.items()}))
    near(grads, want)


def test_a_fresh_forget_gate_is_open():
    """Jozefowicz et al. 2015: the bias of the forget gate starts at one, plus torch's uniform numbers."""
    params = Lstm(width=D, hidden=100).init(jax.random.key(0), jnp.zeros((1, 1, D)), make_sequence(1, 1)[0])["params"]
    i, f, g, o = np.asarray(params["bias"].value)
    assert f.min() >= 0.9 and f.max() <= 1.1 and abs(f.mean() - 1) < 0.02
    assert max(np.abs(v).max() for v in (i, g, o)) <= 0.1
