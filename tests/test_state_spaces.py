"""S4, S4D, H3 and Hyena: against arrays that the authors' code computed (fixtures/state_spaces), and whole mixers, with
the gradients of all parameters, against dense matrices and direct sums in torch, in float64."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.kernels.long_conv.dplr import Dplr
from seqmodels.layers import hippo
from seqmodels.layers.parameter import declarations
from seqmodels.mixers import lti, s4d
from seqmodels.mixers.h3 import H3
from seqmodels.mixers.hyena import Hyena
from seqmodels.mixers.s4 import S4, Readable
from seqmodels.mixers.s4d import Diagonal, S4d
from seqmodels.sequence import make_sequence

torch = pytest.importorskip("torch")

B, T, D = 2, 11, 6
GOLDEN = np.load(pathlib.Path(__file__).parent / "fixtures" / "state_spaces" / "golden.npz")


def golden(case):
    """The arrays of a case, by name."""
    return {name.removeprefix(f"{case}/"): GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{case}/")}


def single(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.complex64 if np.iscomplexobj(v) else jnp.float32), tree)


def near(ours, theirs, tolerance=5e-6):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.asarray(x) - want) / np.linalg.norm(want)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


# The authors' code


@pytest.mark.parametrize(("measure", "windows"), [("legs", 1), ("legt", 2), ("fourier", 2)])
def test_hippo_is_the_authors(measure, windows):
    """Their windows are twice as long."""
    want = golden(f"hippo/{measure}")
    near(hippo.hippo(measure, 8), (windows * want["A"], windows * want["B"]), 1e-12)


@pytest.mark.parametrize("name", s4d.FRESH)
def test_fresh_matrices_are_the_authors(name):
    """They keep the other one of each conjugate pair; float32."""
    ours, theirs = s4d.FRESH[name](8)[0], golden(f"fresh/{name}")["A"]
    near(np.sort_complex(ours), np.sort_complex(theirs.conj()), 1e-6)


@functools.partial(jax.jit, static_argnums=1)
def run(system, length, x):
    h = jnp.zeros((1, x.shape[1] and system.c.shape[0], x.shape[1]), jnp.complex64)
    return system.filter(length), *system.scan(x[None], h, None, None)


@pytest.mark.parametrize("rule", s4d.RULES)
def test_s4d_is_the_authors(rule):
    """Filter, recurrence and state."""
    case = single(golden(f"s4d/{rule}"))
    system = Diagonal(*s4d.RULES[rule](case["A"], case["B"], case["dt"][0]), case["C"])
    taps, y, h = run(system, len(case["x"]), case["x"])
    near((taps, y[0], h[0]), (case["filter"], case["y"], case["state"]), 2e-6)


def test_s4_is_the_authors():
    """The filter, also of another length than that for which their C~ was found first."""
    case = single(golden("s4"))
    system = Readable(Dplr(case["L"], case["P"], case["B"], case["dt"][0]), case["C"])
    for name in ("filter", "longer"):
        near(jax.jit(lambda n: system.filter(n), static_argnums=0)(len(case[name])), case[name], 1e-5)


def test_s4_is_annotated_s4():
    """Filter and recurrence, with the C that they find from C~."""
    case = single(golden("annotated"))
    system = Readable(Dplr(case["L"], case["P"], case["B"], case["dt"]), case["C"])
    taps, y, _ = run(system, len(case["x"]), case["x"])
    near((taps, y[0]), (case["filter"], case["y"]), 1e-5)


# Whole mixers


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(module, scale=0.6):
    """Parameters of a module, of which none has the value of a fresh one."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, D)), make_sequence(1, 2)[0])
    leaves, tree = jax.tree.flatten(nn.unbox(variables["params"]))
    return jax.tree.unflatten(tree, [scale * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def recurrence(a, b, c, x, h):
    """y [B, T, E] and the last state of h_t = a h + b x, a real readout; a [E, N, N], b, c [E, N], h [B, E, N]."""
    ys = []
    for t in range(x.shape[1]):
        h = torch.einsum("enm,bem->ben", a, h) + b * x[:, t, :, None].to(h.dtype)
        ys.append(torch.einsum("en,ben->be", c, h).real)
    return torch.stack(ys, 1), h


def both(v):
    """[E, N] of one of each conjugate pair [N / 2, E]."""
    return torch.cat([v, v.conj()]).T


def pair(v):
    return torch.complex(v[0], v[1])


def linear_system(p, x, state, matrix):
    """y [B, T, E] with the skip, and the new state as the module has it."""
    old = torch.complex(state["real"], state["imag"])
    a, b = matrix(p)
    y, h = recurrence(a, b, both(pair(p["C"])), x, torch.cat([old, old.conj()], 1).transpose(1, 2))
    h = h.transpose(1, 2)[:, : old.shape[1]]
    return y + p["D"] * x, dict(real=h.real, imag=h.imag)


def s4_matrix(p):
    """The bilinear rule by solving with dense matrices."""
    eigenvalues, low, dt = (
        both(torch.complex(-torch.exp(p["L_log"]), p["L_imag"])),
        both(pair(p["P"])),
        p["log_dt"].exp(),
    )
    a = torch.diag_embed(eigenvalues) - low[:, :, None] * low.conj()[:, None]
    half, unit = dt[:, None, None] / 2 * a, torch.eye(a.shape[1], dtype=a.dtype)
    return torch.linalg.solve(unit - half, unit + half), torch.linalg.solve(
        unit - half, dt[:, None] * both(pair(p["B"]))
    )


def s4d_matrix(p, rule="zoh"):
    a, b, dt = both(torch.complex(-torch.exp(p["A_log"]), p["A_imag"])), both(pair(p["B"])), p["log_dt"].exp()[:, None]
    if rule == "zoh":
        return torch.diag_embed(torch.exp(dt * a)), (torch.exp(dt * a) - 1) / a * b
    return torch.diag_embed((1 + dt * a / 2) / (1 - dt * a / 2)), dt * b / (1 - dt * a / 2)


def glu(p, y):
    y = torch.einsum("bte,ecd->btcd", torch.nn.functional.gelu(y), p["out_proj"]) + p["out_bias"]
    return y[:, :, 0] * torch.sigmoid(y[:, :, 1])


def s4_equations(p, x, state, matrix=s4_matrix):
    y, state = linear_system(p, x, state, matrix)
    return glu(p, y), state


def convolved(x, taps, before):
    """The short convolution over x [B, T, E] from the tokens before [B, W - 1, E], and the last tokens."""
    x = torch.cat([before, x], 1)
    length = x.shape[1] - len(taps) + 1
    return sum(tap * x[:, k : k + length] for k, tap in enumerate(taps)), x[:, length:]


def h3_equations(p, x, state):
    q, k, v = (x @ p[f"{name}_proj"] + p[f"{name}_bias"] for name in ("query", "key", "value"))
    k, conv = convolved(k, p["shift_taps"], state["conv"])
    s, new = linear_system(p, k * v, state, s4d_matrix)
    return (q * s) @ p["out_proj"] + p["out_bias"], dict(new, conv=conv)


def hyena_equations(p, x, state, length=16, bands=2):
    """The state is the convolution's; the cache is empty."""
    z, conv = convolved(x @ p["in_proj"] + p["in_bias"], p["conv_weight"], state["conv"])
    gate, second, v = (z + p["conv_bias"]).split(D, -1)
    t = torch.arange(T, dtype=torch.float64)[:, None] / length
    angles = 2 * np.pi * t * torch.linspace(1e-4, bands - 1, bands)
    h = torch.cat([t, torch.cos(angles), -torch.sin(angles)], 1)
    for i in range(3):
        h = torch.sin(p[f"filter_{i}_frequency"] * (h @ p[f"filter_{i}"] + p[f"filter_{i}_bias"]))
    rates = -np.log(1e-2) * torch.linspace(1 / 1.5, 1 / 0.3, D, dtype=torch.float64)
    h = (h @ p["filter_out"]) * torch.exp(-t * rates)
    u = second * v
    y = torch.stack([sum(h[k] * u[:, i - k] for k in range(i + 1)) for i in range(T)], 1) + p["D"] * u
    return (gate * y) @ p["out_proj"] + p["out_bias"], dict(conv=conv)


CASES = {
    "s4": (S4(width=D, state=4, bias=True), s4_equations),
    "s4d, zoh": (S4d(width=D, state=4, bias=True), functools.partial(s4_equations, matrix=s4d_matrix)),
    "s4d, bilinear": (
        S4d(width=D, state=4, bias=True, rule="bilinear"),
        functools.partial(s4_equations, matrix=functools.partial(s4d_matrix, rule="bilinear")),
    ),
    "h3": (H3(width=D, state=4, bias=True), h3_equations),
    "hyena": (Hyena(width=D, length=16, bands=2, filter_width=8, frequency=1.0, bias=True), hyena_equations),
}
CACHE = ("u", "document", "length")


@pytest.mark.parametrize("stateless", [True, False], ids=["no state", "state"])
@pytest.mark.parametrize("name", CASES)
def test_the_mixer_is_its_equations(name, stateless):
    """By convolution from no state, else by recurrence or cache: outputs, states, gradients of all arguments."""
    module, equations = CASES[name]
    whole = jax.tree.map(np.asarray, module.init_state(B, T))
    cache = {key: jnp.asarray(v) for key, v in whole.items() if key in CACHE}
    names = [key for key in whole if key not in CACHE]
    state = {key: (0 if stateless else 1) * draw(*whole[key].shape, seed=i) for i, key in enumerate(names)}
    dlast = {key: draw(*whole[key].shape, seed=9 + i) for i, key in enumerate(names)}
    params, x, dy = drawn(module), draw(B, T, D), draw(B, T, D, seed=2)
    seq = make_sequence(B, T)[0]

    @jax.jit
    def ours(params, x, state):
        def outputs(params, x, state):
            y, new = module.apply({"params": params}, x, seq, None if stateless else state | cache)
            return y, {key: new[key] for key in names}

        results, pull = jax.vjp(outputs, params, x, state)
        return results, pull(single((dy, dlast)))

    results, gradients = ours(*single((params, x, state)))
    tensors = jax.tree.map(lambda v: torch.tensor(v, requires_grad=True), (params, x, state))
    y, new = equations(*tensors)
    ((y * torch.tensor(dy)).sum() + sum((new[key] * torch.tensor(dlast[key])).sum() for key in names)).backward()
    plain = lambda v: v.detach().numpy()  # noqa: E731
    near(results, (plain(y), {key: plain(new[key]) for key in names}))
    count = 2 if stateless else 3
    near(gradients[:count], jax.tree.map(lambda v: v.grad.numpy(), tensors)[:count], 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4", "s4d, zoh"])
def test_convolution_equals_recurrence_over_several_spans(name):
    """Documents and padding included, in value and gradient."""
    module, length = CASES[name][0], 2 * lti.SPAN + 7
    params, x, dy = single((drawn(module), draw(B, length, D), draw(B, length, D, seed=2)))
    params = dict(params, log_dt=params["log_dt"] - 4)  # memories of many tokens
    ids = np.repeat([[0, 1], [5, 4]], [60, length - 60], axis=1).astype(np.int32)
    mask = draw(B, length, seed=3) > -1
    seq = make_sequence(B, length, ids, mask)[0]
    dy = jnp.where(mask[..., None], dy, 0)

    @jax.jit
    def run(params, x, state):
        y, pull = jax.vjp(lambda params, x: module.apply({"params": params}, x, seq, state)[0], params, x)
        return jnp.where(mask[..., None], y, 0), pull(dy)

    near(run(params, x, None), jax.tree.map(np.asarray, run(params, x, module.init_state(B))), 2e-5)


# Fresh models and fields


@pytest.mark.parametrize("kind", [S4, S4d, H3])
def test_matrices_and_steps_have_their_own_rate_and_no_decay(kind):
    boxed = jax.eval_shape(kind(width=D).init, jax.random.key(0), jnp.zeros((1, 2, D)), make_sequence(1, 2)[0])[
        "params"
    ]
    ssm = {name for name, box in boxed.items() if declarations(box)[0].group == "ssm"}
    letter = "L" if kind is S4 else "A"
    assert ssm == {f"{letter}_log", f"{letter}_imag", "B", "log_dt"} | ({"P"} if kind is S4 else set())
    assert not any(declarations(boxed[name])[0].decayed for name in ssm)
    assert declarations(boxed["C"])[0].decayed


def test_a_fresh_s4_is_hippo():
    """The continuous matrix in the basis of its states is LegS, and steps lie in their range."""
    module = S4(width=64, state=8, dt_min=0.01, dt_max=0.05)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, 64)), make_sequence(1, 2)[0]))["params"]
    form = hippo.nplr(8)
    eigenvalues = -np.exp(params["L_log"][:, 5]) + 1j * params["L_imag"][:, 5]
    p = np.real(2 * form.vectors @ (params["P"][0] + 1j * params["P"][1])[:, 5])
    a = np.real(2 * (form.vectors * np.asarray(eigenvalues)) @ form.vectors.conj().T) - np.outer(p, p)
    np.testing.assert_allclose(a, hippo.legs(8)[0], atol=1e-5)
    steps = np.exp(params["log_dt"])
    assert steps.min() >= 0.01 and steps.max() <= 0.05 and steps.max() / steps.min() > 2


def test_dt_scale_is_the_step():
    """Half of every step is another model with its steps halved."""
    params = single(drawn(S4d(width=D, state=4)))
    seq, x = make_sequence(B, T)[0], single(draw(B, T, D))
    run = lambda params, **options: S4d(width=D, state=4, **options).apply({"params": params}, x, seq)[0]  # noqa: E731
    near(run(params, dt_scale=0.5), run(dict(params, log_dt=params["log_dt"] - np.log(2))), 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S4(width=D, state=5), "s4.state=5: must be .*between 2 and 1024, and even"),
        (lambda: S4d(width=D, init_A="hippo"), "s4d.init_A='hippo': must be one of 'legs', 'lin', 'inv', 'real'"),
        (lambda: S4d(width=D, rule="euler"), "s4d.rule='euler': must be one of 'zoh', 'bilinear'"),
        (lambda: H3(width=D, dt_max=1e-4), "h3.dt_max=0.0001: must be at least dt_min=0.001"),
        (lambda: Hyena(width=D, bands=0), "hyena.bands=0: must be .*at least 1"),
    ],
    ids=["state", "init_A", "rule", "dt_max", "bands"],
)
def test_wrong_fields_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Hyena's cache


def test_hyena_needs_room_and_says_so():
    module, x = Hyena(width=D, filter_width=4), jnp.zeros((B, T, D))
    params = single(drawn(module))
    with pytest.raises(ValueError, match="hyena: max_length=None: must be at least 1"):
        module.init_state(B)
    with pytest.raises(ValueError, match="hyena: 11 tokens do not fit into a cache of 10 slots"):
        module.apply({"params": params}, x, make_sequence(B, T)[0], module.init_state(B, 10))


def test_hyenas_tokens_without_a_slot_are_nan():
    module, x = Hyena(width=D, filter_width=4), single(draw(B, 2, D))
    params, state = single(drawn(module)), module.init_state(B, 3)
    y, state = module.apply({"params": params}, x, make_sequence(B, 2)[0], state)
    assert np.isfinite(y).all()
    seq = make_sequence(B, 2, position=jnp.full((B,), 2, jnp.int32))[0]
    y, _ = module.apply({"params": params}, x, seq, state)
    assert np.isfinite(y[:, 0]).all() and np.isnan(y[:, 1]).all()
