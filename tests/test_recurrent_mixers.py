"""minGRU, minLSTM, HGRN and the dilated convolutions against their equations in torch, in float64.

test_parity_transformers.py has RG-LRU, in RecurrentGemma.

Outputs, states, and the gradients of every parameter, of the input and of the first state, from parameters that are
drawn. Measured: they differ by at most 2e-6 of their norm.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.mixers.cnn import Cnn
from seqmodels.mixers.hgrn import Hgrn
from seqmodels.mixers.mingru import MinGru
from seqmodels.mixers.minlstm import MinLstm
from seqmodels.mixers.rglru import RgLru, bounded_sqrt, fresh_rate
from seqmodels.sequence import make_sequence

torch = pytest.importorskip("torch")

B, T, D, E = 2, 11, 6, 8


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(module, scale=0.6):
    """Parameters of a module, of which none has the value of a fresh one."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, D)), make_sequence(1, 2)[0])
    leaves, tree = jax.tree.flatten(nn.unbox(variables["params"]))
    return jax.tree.unflatten(tree, [scale * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def near(ours, theirs, tolerance=5e-6):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def float32(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


def ours(module, params, x, state, dy, dlast):
    """y, the new state, and the gradients of params, x and state. The first token continues a document."""
    seq = make_sequence(B, T, position=jnp.full((B,), 100, jnp.int32))[0]

    @jax.jit
    def run(params, x, state):
        results, pull = jax.vjp(lambda p, x, s: module.apply({"params": p}, x, seq, s), params, x, state)
        return results, pull(float32((dy, dlast)))

    return run(*float32((params, x, state)))


def theirs(equations, params, x, state, dy, dlast):
    """The same by torch in float64; `equations(params, x, state)` gives y and the new state."""
    tensors = jax.tree.map(lambda v: torch.tensor(v, requires_grad=True), (params, x, state))
    y, new = equations(*tensors)
    loss = (y * torch.tensor(dy)).sum()
    loss = loss + sum((a * torch.tensor(b)).sum() for a, b in zip(*map(jax.tree.leaves, (new, dlast)), strict=True))
    loss.backward()
    plain = functools.partial(jax.tree.map, lambda v: v.detach().numpy())
    return plain((y, new)), jax.tree.map(lambda v: v.grad.numpy(), tensors)


def scan(decay, inputs, state):
    """h_t = decay_t h_{t-1} + inputs_t, token by token, of [B, T, E]."""
    hs = []
    for t in range(inputs.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        hs.append(state)
    return torch.stack(hs, 1), state


def g(x, kind):
    return x if kind == "linear" else torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def mingru(p, x, h, kind="linear"):
    z = torch.sigmoid(x @ p["gate_proj"] + p["gate_bias"])
    h, last = scan(1 - z, z * g(x @ p["in_proj"], kind), h)
    return h @ p["out_proj"], last


def minlstm(p, x, h, kind="linear"):
    f, i = (torch.sigmoid(x @ p[f"{name}_proj"] + p[f"{name}_bias"]) for name in ("forget", "input"))
    h, last = scan(f / (f + i), i / (f + i) * g(x @ p["in_proj"], kind), h)
    return h @ p["out_proj"], last


def hgrn(p, x, h):
    silu = torch.nn.functional.silu
    bound = torch.sigmoid(p["bound_logit"])
    decay = bound + (1 - bound) * torch.sigmoid(x @ p["decay_proj"])
    h, last = scan(decay, (1 - decay) * silu(x @ p["in_proj"]), h)
    normed = h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5) * p["scale"]
    return (normed * silu(x @ p["read_proj"])) @ p["out_proj"], last


DIAGONAL = {
    "mingru": (MinGru(width=D, hidden=E), mingru),
    "mingru, positive": (MinGru(width=D, hidden=E, candidate="positive"), functools.partial(mingru, kind="positive")),
    "minlstm": (MinLstm(width=D, hidden=E), minlstm),
    "minlstm, positive": (
        MinLstm(width=D, hidden=E, candidate="positive"),
        functools.partial(minlstm, kind="positive"),
    ),
    "hgrn": (Hgrn(width=D, hidden=E), hgrn),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_the_mixer_is_its_equations(name):
    module, equations = DIAGONAL[name]
    arrays = drawn(module), draw(B, T, D), draw(B, E, seed=1), draw(B, T, D, seed=2), draw(B, E, seed=3)
    near(ours(module, *arrays), theirs(equations, *arrays))


@pytest.mark.parametrize("kind", [MinGru, MinLstm, Hgrn])
def test_gates_that_are_shut_keep_the_state(kind):
    """With decays of 1 - e^-60, which are 1 in float32, a state stays what it is, and small inputs are not lost."""
    module = kind(width=D, hidden=E)
    shut = dict(gate_bias=-60.0, input_bias=-60.0, bound_logit=60.0)
    params = {name: np.full_like(v, shut.get(name, 0)) for name, v in drawn(module).items()}
    params["in_proj"] = draw(D, E)
    step = lambda state: ours(module, params, draw(B, T, D), state, np.zeros((B, T, D)), state)[0][1]  # noqa: E731
    np.testing.assert_array_equal(step(np.ones((B, E))), 1)
    small = np.abs(step(np.zeros((B, E))))
    assert (small > 0).all() and (small < 1e-20).all()


# Dilated convolutions


def wavenet(p, x, state, module):
    """With torch's convolution over the state and the tokens."""
    y, new = torch.zeros_like(x), {}
    for i, dilation in enumerate(module.dilations):
        tokens = torch.cat([state[f"conv_{i}"], x + y], 1)
        taps = p[f"taps_{i}"].T[:, None]
        u = torch.nn.functional.conv1d(tokens.mT, taps, dilation=dilation, groups=D).mT
        f, gate = (u @ p[f"gates_{i}"][:, j] for j in (0, 1))
        y = y + (torch.tanh(f) * torch.sigmoid(gate)) @ p[f"out_{i}"]
        new[f"conv_{i}"] = tokens[:, T:]
    return y, new


@pytest.mark.parametrize("conv, dilations", [(3, (1, 2, 4)), (2, (5, 1, 13))], ids=["doubled", "longer than the row"])
def test_the_stack_is_torchs_convolutions(conv, dilations):
    module = Cnn(width=D, conv=conv, dilations=dilations)
    sizes = {f"conv_{i}": (conv - 1) * d for i, d in enumerate(dilations)}
    state = {name: draw(B, size, D, seed=4 + i) for i, (name, size) in enumerate(sizes.items())}
    dlast = {name: draw(B, size, D, seed=14 + i) for i, (name, size) in enumerate(sizes.items())}
    arrays = drawn(module), draw(B, T, D), state, draw(B, T, D, seed=2), dlast
    near(ours(module, *arrays), theirs(functools.partial(wavenet, module=module), *arrays))


# RG-LRU


def test_the_root_is_not_steeper_than_its_limit():
    """sqrt(1 - a^2) where a is 1 in float32: finite gradients, and exact ones elsewhere."""
    slope = jax.vmap(jax.grad(bounded_sqrt))(jnp.array([0.0, 1e-12, 0.25, 1.0]))
    np.testing.assert_allclose(slope, [1000, 1000, 1, 0.5], rtol=1e-6)


def test_fresh_decays_are_in_their_ring():
    a = np.exp(-jax.nn.softplus(fresh_rate(jax.random.key(0), (4096,))))
    assert 0.9 <= a.min() < 0.901 and 0.998 < a.max() <= 0.9991
    assert abs((a**2).mean() - (0.9**2 + 0.999**2) / 2) < 5e-3  # uniform by area


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: RgLru(width=D, heads=4), r"rglru.heads=4: must be a divisor of model.width=6"),
        (lambda: RgLru(width=D, hidden=9, heads=2), r"rglru.heads=2: must be a divisor of hidden=9"),
        (lambda: RgLru(width=D, heads=2, conv=9), r"rglru.conv=9: must be .*between 2 and 8"),
        (lambda: Cnn(width=D, dilations=(1, 0)), r"cnn.dilations=\(1, 0\): must be .*each an integer, at least 1"),
        (lambda: Cnn(width=D, dilations=()), r"cnn.dilations=\(\): must be .*each an integer, at least 1"),
        (lambda: MinGru(width=D, candidate="log"), r"mingru.candidate='log': must be one of 'linear', 'positive'"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
