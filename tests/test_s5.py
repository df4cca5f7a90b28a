"""S5 against the authors' formulas in PyTorch's float64, its fresh parameters, and their groups."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.layers.hippo import nplr
from seqmodels.layers.parameter import declarations
from seqmodels.mixers.s5 import S5
from seqmodels.sequence import make_sequence

torch = pytest.importorskip("torch")
B, T, D = 2, 9, 6


def perturbed(module, seed=1):
    """Parameters of a small S5; fresh ones, with biases of zero, hide bugs."""
    params = nn.unbox(module.init(jax.random.key(0), jnp.zeros((B, T, D)), make_sequence(B, T)[0]))["params"]
    draw = np.random.default_rng(seed)
    return {name: jnp.float32(x + 0.1 * draw.normal(size=x.shape)) for name, x in params.items()}


def in_float64(p, x, steps, discretization, activation):
    """lindermanlab/S5's layer without norm and residual sum, token by token: steps [B, T] multiply exp(log_step)."""
    eigenvalues = torch.complex(torch.clamp(p["Lambda_re"], max=-1e-4), p["Lambda_im"])
    matrix, output = (torch.complex(p[name][..., 0], p[name][..., 1]) for name in "BC")
    state, ys = torch.zeros(x.shape[0], len(eigenvalues), dtype=torch.complex128), []
    for t in range(x.shape[1]):
        step = steps[:, t, None] * torch.exp(p["log_step"])
        if discretization == "zoh":
            decay = torch.exp(eigenvalues * step)
            entry = (decay - 1) / eigenvalues
        else:
            inverse = 1 / (1 - step / 2 * eigenvalues)
            decay, entry = inverse * (1 + step / 2 * eigenvalues), inverse * step
        state = decay * state + entry * (x[:, t].to(state.dtype) @ matrix.T)
        ys.append(2 * (state @ output.T).real + p["D"] * x[:, t])
    y = torch.stack(ys, 1)
    g = torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "gelu":
        return g
    gate = torch.sigmoid(g @ p["gate_proj"] + p["gate_bias"])
    if activation == "full_glu":
        return (g @ p["value_proj"] + p["value_bias"]) * gate
    return (g if activation == "half_glu1" else y) * gate


@pytest.mark.parametrize(
    ("discretization", "activation"),
    [("zoh", "half_glu1"), ("zoh", "full_glu"), ("bilinear", "half_glu2"), ("bilinear", "gelu")],
)
def test_the_authors_formulas(discretization, activation):
    """Values, and gradients of the parameters, of the input and of the steps."""
    module = S5(D, state=8, blocks=2, discretization=discretization, activation=activation, bias=True)
    params, draw = perturbed(module), np.random.default_rng(0)
    x, dy = draw.normal(size=(2, B, T, D)).astype(np.float32)
    steps = draw.uniform(0.1, 3, (B, T)).astype(np.float32)

    @jax.jit
    def run(params, x, steps):
        return module.apply({"params": params}, x, make_sequence(B, T, steps=steps)[0])[0]

    got, pull = jax.vjp(run, params, x, steps)
    theirs = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (*params.values(), x, steps)]
    want = in_float64(dict(zip(params, theirs, strict=False)), *theirs[-2:], discretization, activation)
    want.backward(torch.tensor(np.asarray(dy, np.float64)))
    np.testing.assert_allclose(got, want.detach(), rtol=1e-4, atol=2e-6)
    mine, *rest = pull(jnp.asarray(dy))
    for name, ours, reference in zip([*params, "x", "steps"], (*(mine[n] for n in params), *rest), theirs, strict=True):
        scale = np.abs(reference.grad.numpy()).max()
        np.testing.assert_allclose(ours, reference.grad, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def test_a_held_input_read_at_half_the_rate():
    """With zero-order hold, every input twice gives at every second token what steps of 2 give on each input once."""
    module = S5(D, state=8)
    params, x = perturbed(module), np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    run = lambda x, **time: module.apply({"params": params}, x, make_sequence(*x.shape[:2], **time)[0])  # noqa: E731
    twice, last = run(np.repeat(x, 2, axis=1))
    for time in (dict(steps=jnp.full((B, T), 2.0)), dict(rescale=2.0)):
        once, end = run(x, **time)
        np.testing.assert_allclose(once, twice[:, 1::2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(end, last, rtol=1e-4, atol=1e-5)


def test_fresh_parameters():
    """Blocks are HiPPO-N; B and C come from real and complex matrices of variance 1 / P; steps lie in their range."""
    half, width, blocks = 32, 128, 2
    module, seq = S5(width, state=2 * half, blocks=blocks, dt_min=0.01), make_sequence(1, 2)[0]
    p = nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 2, width)), seq))["params"]
    part = nplr(2 * half // blocks)
    np.testing.assert_allclose(p["Lambda_re"] + 1j * p["Lambda_im"], np.tile(part.eigenvalues, blocks), rtol=1e-6)
    back = lambda x: np.einsum("nm,jmd->jnd", part.vectors, x.reshape(blocks, -1, width))  # noqa: E731
    B = back(np.asarray(p["B"][..., 0] + 1j * p["B"][..., 1]))
    assert np.std(2 * B.real) == pytest.approx((2 * half) ** -0.5, rel=0.03)
    assert np.std(p["C"]) == pytest.approx((2 * half) ** -0.5, rel=0.03)
    steps = np.exp(p["log_step"])
    assert 0.01 <= steps.min() < 0.02 and 0.05 < steps.max() <= 0.1


@pytest.mark.parametrize(
    ("fields", "of_rest", "decayed"),
    [
        ({}, {"C", "D", "gate_proj"}, {"C", "gate_proj"}),
        (dict(rates="BandCdecay"), {"C", "D", "gate_proj"}, {"B", "C", "gate_proj"}),
        (dict(rates="BfastandCdecay"), {"B", "C", "D", "gate_proj"}, {"B", "C", "gate_proj"}),
        (dict(rates="noBCdecay"), {"gate_proj"}, {"gate_proj"}),
        (dict(dt_global=True), {"C", "D", "gate_proj", "log_step"}, {"C", "gate_proj", "log_step"}),
    ],
)
def test_groups_of_the_learning_rate(fields, of_rest, decayed):
    """As lindermanlab/S5's `opt_config`, but for the weight decay of vectors, which we have nowhere else."""
    boxed = jax.eval_shape(S5(D, **fields).init, jax.random.key(0), jnp.zeros((B, T, D)), make_sequence(B, T)[0])
    there = dict(zip(sorted(boxed["params"]), declarations(boxed), strict=True))
    assert {name for name, leaf in there.items() if not leaf.group} == of_rest
    assert {leaf.group for leaf in there.values()} == {"", "ssm"}
    assert {name for name, leaf in there.items() if leaf.decayed} == decayed


def test_clipped_eigenvalues():
    """No state grows: a real part above zero counts as -1e-4, unless the field says otherwise."""
    module = S5(D, state=8)
    params, x = perturbed(module), np.ones((B, T, D), np.float32)
    run = lambda module, value: module.apply(  # noqa: E731
        {"params": params | dict(Lambda_re=jnp.full(4, value))}, x, make_sequence(B, T, rescale=100.0)[0]
    )[1]
    np.testing.assert_array_equal(run(module, 0.1), run(module, -1e-4))
    grown = np.abs(run(module.clone(clip_eigs=False), 0.1)).max()
    assert grown > 10 * np.abs(run(module, 0.1)).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(state=6, blocks=2), r"config.model.s5.state=6: must be a multiple of 4 with blocks=2"),
        (dict(discretization="euler"), r"config.model.s5.discretization='euler': must be one of 'zoh', 'bilinear'"),
        (dict(dt_min=0.2), r"config.model.s5.dt_max=0.1: must be at least dt_min=0.2"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        S5(D, **fields)
