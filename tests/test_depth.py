"""Connections across depth, each against its paper's equations over stored arrays, in float64."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from seqmodels import backbone
from seqmodels.branch import Links
from seqmodels.branches import BRANCHES
from seqmodels.config import complete_model
from seqmodels.configs.base import base
from seqmodels.depth import hyper, streams
from seqmodels.errors import UserError
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mlp import MLP
from seqmodels.interop.stacking import stack
from seqmodels.model import build
from seqmodels.sequence import make_sequence

B, T, D, REPEATS, VOCABULARY = 2, 7, 8, 4, 11
STEPS = 2 * REPEATS

FORMS = {
    "value": dict(depth="value"),
    "mudd": dict(depth="mudd"),
    "denseformer": dict(depth="denseformer"),
    "attnres full": dict(depth="attnres", attnres__form="full"),
    "attnres block": dict(depth="attnres", attnres__blocks=3),
    "attnres delta": dict(depth="attnres", attnres__form="delta"),
    "attnres fused": dict(depth="attnres", attnres__blocks=3, implementation__attn_residual="reference"),
    "hyper identity": dict(depth="hyper", hyper__streams=3),
    "hyper fused": dict(depth="hyper", hyper__streams=3, implementation__hyper_connection="reference"),
    "hyper lite": dict(depth="hyper", hyper__streams=3, hyper__mixing="lite"),
    "hyper sinkhorn": dict(depth="hyper", hyper__streams=3, hyper__mixing="sinkhorn"),
}
QUICK = ("attnres block", "mudd")  # of make test-fast
every_form = pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)


def config_of(form, **fields):
    config = base().model
    config.update(pattern="mamba+mlp", width=D, repeats=REPEATS)
    config.mamba, config.mlp = MAMBA.defaults(state=4), MLP.defaults(hidden=12)
    config.implementation.selective_scan = "reference"  # quick to compile; all others equal it
    for name, value in {**FORMS.get(form, {}), **fields}.items():
        holder, _, last = name.rpartition("__")
        (config[holder] if holder else config)[last] = value
    return complete_model(config)


@functools.cache
def model(form, **fields):
    return build(config_of(form, **fields), VOCABULARY)


@functools.cache
def fresh(form):
    init = jax.jit(model(form).init)
    return nn.unbox(init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]


@functools.cache
def perturbed(form):
    leaves, tree = jax.tree.flatten(fresh(form))
    draw = np.random.default_rng(1)
    moved = [x + (0.3 if x.ndim > 1 else 0.2) * draw.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, moved)


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden(form, fields, params, tokens, state=None):
    return model(form, **dict(fields)).apply({"params": params}, tokens, state=state)


def without_connection(params):
    """The parameters of the plain network among them."""
    kinds = ("attnres", "denseformer", "hyper", "mudd", "value")
    return {
        name: {k: v for k, v in part.items() if k not in kinds} if name.startswith("block") else part
        for name, part in params.items()
        if name not in kinds
    }


def tokens():
    return jnp.asarray(np.random.default_rng(5).integers(0, VOCABULARY, (B, T)), jnp.int32)


def rms(x, scale=None):
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)
    return normed if scale is None else normed * np.asarray(scale, np.float64)


def softmax(x, axis=0):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def doubled(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.cache
def branches():
    """Mamba, the MLP, and Mamba of several inputs, which are the same with all connections."""
    mamba, mlp = (backbone.branch_of(config_of("none"), name, parent=None).apply for name in ("mamba", "mlp"))
    linked = lambda params, x, seq, inputs: mamba(params, x, seq, None, Links(inputs))  # noqa: E731
    return [jax.jit(mamba), jax.jit(mlp)], jax.jit(linked)


class Steps:
    """The steps of a model by hand: norms in float64, branches by the library, whose own tests are elsewhere."""

    def __init__(self, form):
        self.params = jax.tree.map(np.asarray, perturbed(form))
        self.branches, self.linked = branches()
        self.seq = make_sequence(B, T)[0]

    def connection(self, kind, block):
        return doubled(self.params[f"block_{block}"][kind])

    def run(self, step, x, **links):
        """The output of step number `step` of the model, of its input before the norm."""
        block = self.params[f"block_{step // 2}"]
        norm, place = (("norm", "mixer"), ("mlp_norm", "mlp"))[step % 2]
        normed = jnp.asarray(rms(x, block[norm]["scale"]), jnp.float32)
        y, _ = self.branches[step % 2]({"params": block[place]}, normed, self.seq, **links)
        return np.asarray(y, np.float64)

    def embedding(self):
        return np.asarray(self.params["embedding"], np.float64)[np.asarray(tokens())]

    def last(self, x):
        return rms(x, self.params["final_norm"]["scale"])


def attend(values, query, scale):
    values = np.stack(values)
    weights = softmax(np.einsum("sbtd,d->sbt", rms(values, scale), query))
    return np.einsum("sbt,sbtd->btd", weights, values)


def attnres(form):
    """Kimi's equations; for "delta" those of the repository that introduced it."""
    steps, end = Steps(form), None
    outputs, size = [steps.embedding()], {"attnres block": -(-STEPS // 3), "attnres fused": -(-STEPS // 3)}.get(form, 1)
    stream = outputs[0]
    for step in range(STEPS):
        own = steps.connection("attnres", step // 2)
        sums = [outputs[0], *[sum(outputs[1 + i : 1 + min(i + size, step)]) for i in range(0, step, size)]]
        mean = attend(sums, own[f"query_{step % 2}"], own[f"scale_{step % 2}"])
        h = mean if form != "attnres delta" else stream + (mean if step else 0)
        y = steps.run(step, h)
        outputs.append(y)
        stream = stream + y
    if form == "attnres delta":
        return steps.last(stream)
    end = {k: np.asarray(v, np.float64) for k, v in steps.params["attnres"].items()}
    sums = [outputs[0], *[sum(outputs[1 + i : 1 + min(i + size, STEPS)]) for i in range(0, STEPS, size)]]
    return steps.last(attend(sums, end["query_0"], end["scale_0"]))


def denseformer(form):
    steps = Steps(form)
    y = steps.embedding()
    below = [y]
    for block in range(REPEATS):
        x = y
        for step in (2 * block, 2 * block + 1):
            x = x + steps.run(step, x)
        below.append(x)
        weights = steps.connection("denseformer", block)["weights"]
        y = sum(weights[i] * x for i, x in enumerate(reversed(below)))
    return steps.last(y)


def hyper_connections(form):
    steps, n = Steps(form), 3
    X = np.stack([steps.embedding()] * n, axis=2)
    for step in range(STEPS):
        own = {k.removesuffix(f"_{step % 2}"): v for k, v in steps.connection("hyper", step // 2).items()
               if k.endswith(f"_{step % 2}")}  # fmt: skip
        coefficients = rms(X.reshape(B, T, -1)) @ own["kernel"].reshape(n * D, -1)
        p, q, r = np.split(coefficients, [n, 2 * n], axis=-1)
        pre = sigmoid(own["scale"][0] * p + own["pre_bias"])
        post = 2 * sigmoid(own["scale"][1] * q + own["post_bias"])
        H = np.broadcast_to(np.eye(n), (B, T, n, n))
        if form == "hyper lite":
            weights = softmax(own["scale"][2] * r + own["mix_bias"], axis=-1)
            H = np.einsum("btp,pij->btij", weights, hyper.permutations(n))
        if form == "hyper sinkhorn":
            H = np.exp((own["scale"][2] * r + own["mix_bias"]).reshape(B, T, n, n))
            for _ in range(20):
                H = H / H.sum(-2, keepdims=True)
                H = H / H.sum(-1, keepdims=True)
        y = steps.run(step, np.einsum("btn,btnd->btd", pre, X))
        X = np.einsum("btij,btjd->btid", H, X) + post[..., None] * y[:, :, None]
    return steps.last(X.mean(2))


def value(form):
    """Mamba's values are its convolved inputs. So its scan is called on mixed ones here."""
    steps, first = Steps(form), []
    x, mamba = steps.embedding(), backbone.branch_of(config_of(form), "mamba", parent=None)

    @jax.jit
    def mixed(params, x, first, weights):
        bound = mamba.bind({"params": params})
        stream, readout = bound.stream_and_readout(x, steps.seq)
        u = stream.u
        stream = stream.replace(u=weights[0] * u + weights[1] * (u if first is None else first))
        return bound.project(bound.scan(stream, readout, steps.seq)[0]), u

    for step in range(STEPS):
        if step % 2:
            x = x + steps.run(step, x)
            continue
        block = steps.params[f"block_{step // 2}"]
        normed = jnp.asarray(rms(x, block["norm"]["scale"]), jnp.float32)
        y, u = mixed(block["mixer"], normed, first[0] if first else None, block["value"]["weights_Mamba"])
        first.append(u)
        x = x + np.asarray(y, np.float64)
    return steps.last(x)


def mudd(form):
    steps = Steps(form)
    outputs = [steps.embedding()]

    def mixes(own, ways):
        hidden = rms(outputs[-1]) @ own["hidden"]
        hidden = hidden * (1 + scipy.special.erf(hidden / np.sqrt(2))) / 2
        weights = np.einsum("btk,kcs->cbts", hidden, own["weights"]) + own["bias"][:, None, None]
        assert len(weights) == ways
        return [sum(w[..., i, None] * x for i, x in enumerate(reversed(outputs))) for w in weights]

    for block in range(REPEATS):
        own, params = steps.connection("mudd", block), steps.params[f"block_{block}"]
        main, gate, x = mixes(own, 3)
        normed = jnp.asarray(rms(main, params["norm"]["scale"]), jnp.float32)
        inputs = dict(z=jnp.asarray(rms(gate, own["norms_z"]["scale"]), jnp.float32))
        x = x + np.asarray(steps.linked({"params": params["mixer"]}, normed, steps.seq, inputs)[0], np.float64)
        outputs.append(x + steps.run(2 * block + 1, x))
    return steps.last(mixes(doubled(steps.params["mudd"]), 1)[0])


@every_form
def test_equals_its_papers_equations(form):
    by_hand = dict(denseformer=denseformer, attnres=attnres, hyper=hyper_connections, value=value, mudd=mudd)[
        form.split()[0]
    ]
    got, _ = hidden(form, (), perturbed(form), tokens())
    np.testing.assert_allclose(got, by_hand(form), rtol=2e-4, atol=2e-4)
    assert np.abs(got - hidden("none", (), without_connection(perturbed(form)), tokens())[0]).max() > 0.01


@every_form
def test_a_fresh_model_is_the_plain_network_or_takes_uniform_means(form):
    params = fresh(form)
    if form.startswith("attnres"):
        queries = [v for path, v in jax.tree.leaves_with_path(params) if "query" in jax.tree_util.keystr(path)]
        assert queries and not any(np.any(v) for v in queries)
        return
    params = params | {"embedding": 100 * params["embedding"]}  # so that the norms' epsilon does not count
    want, _ = hidden("none", (), without_connection(params), tokens())
    np.testing.assert_allclose(hidden(form, (), params, tokens())[0], want, rtol=1e-3, atol=1e-4)


def test_sums_of_streams_have_the_gradients_that_jax_derives():
    """Products, mean squares and what is added to streams have backward passes of their own."""
    draw = np.random.default_rng(3)
    shapes = dict(X=(3, B, T, D), post=(3, B, T), y=(B, T, D), W=(3, D, 5))
    arrays = {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    weights = [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((3, B, T, D), (5, B, T))]

    def ours(X, post, y, W):
        new, square = streams.added(tuple(X), post, y, jnp.dtype("float32"))
        square = streams.known_mean_square(new, jax.lax.stop_gradient(square))
        return jnp.stack(new), streams.products(new, W) * jax.lax.rsqrt(square)

    def plain(X, post, y, W):
        new = X + post[..., None] * y
        return new, jnp.einsum("nbtd,ndk->kbt", new, W) / jnp.sqrt(jnp.mean(new**2, axis=(0, -1)))

    def gradients(function):
        total = lambda *args: sum(jnp.sum(w * x) for w, x in zip(weights, function(*args), strict=True))  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(*arrays.values())

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), gradients(ours), gradients(plain))


def value_and_gradients(form, fields, params):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, D)), jnp.float32)
    loss = lambda params: (jnp.sum(weights * (y := hidden(form, fields, params, tokens())[0])), y)  # noqa: E731
    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(params)
    return y, gradients


@functools.cache
def unrolled(form):
    """Value and gradients of blocks that run one by one and save everything."""
    return value_and_gradients(form, (), perturbed(form))


@every_form
@pytest.mark.slow
@pytest.mark.parametrize("fields", [dict(scan_blocks=2, remat="block"), dict(remat="block")])
def test_scanned_and_rematerialised_are_the_same(form, fields):
    """In value, and in the gradient of every parameter."""

    def stacked(tree):
        if "scan_blocks" not in fields:
            return tree
        return stack(tree, fields["scan_blocks"], backbone.scanned(config_of(form, **fields))[0])

    if "scan_blocks" in fields and form == "attnres fused":
        fields = fields | dict(implementation__attn_residual="")  # the same parameters
    y, gradients = unrolled(form)
    got, got_gradients = value_and_gradients(form, tuple(fields.items()), stacked(perturbed(form)))
    np.testing.assert_allclose(got, y, rtol=2e-4, atol=2e-5)
    # In the first block the streams are still equal, so how they are mixed has no gradient. What float32 leaves of it
    # is the rounding of terms as large as the largest gradients.
    rounding = np.finfo(np.float32).eps * max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max() + rounding),
        got_gradients,
        stacked(gradients),
    )


@every_form
def test_one_token_at_a_time(form):
    """No connection has a state of its own: it mixes what a token has at other depths."""
    params, whole = perturbed(form), hidden(form, (), perturbed(form), tokens())[0]
    state, ys = model(form).init_state(B, T), []
    for t in range(T):
        y, state = hidden(form, (), params, tokens()[:, t : t + 1], state)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys, 1), whole, rtol=1e-4, atol=1e-4)


MIXERS = ("attention", "mamba2", "retnet", "linear_attention")  # that are valued and have ways
HYBRIDS = {"value": MIXERS, "mudd": MIXERS, "attnres block": ("gla", "rwkv+rwkv_channel", "rglru"),
           "hyper identity": ("deltanet", "lstm|mlp", "mamba3")}  # fmt: skip
SIZES = {"attention": dict(heads=2, kv_heads=1), "mamba2": dict(head_dim=4, state=4)}


@pytest.mark.slow
@pytest.mark.parametrize("form", HYBRIDS)
def test_in_hybrids(form):
    """Packed documents behind padding are what each is alone, and a token at a time gives the same."""
    mixers, draw = HYBRIDS[form], np.random.default_rng(3)
    names = {name for word in mixers for name in re.split(r"[+|]", word)}
    config = base().model
    config.update(pattern=" ".join(mixers), width=8, repeats=1 + (form == "value"))
    for name in sorted(names):
        if (options := BRANCHES[name].options) is not None:
            config[name] = options.defaults(**SIZES.get(name, {}))
    for name, value in FORMS[form].items():
        holder, _, last = name.rpartition("__")
        (config[holder] if holder else config)[last] = value
    module = build(complete_model(config), VOCABULARY)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    params = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), params)
    apply = jax.jit(lambda tokens, *rest: module.apply({"params": params}, tokens, *rest))
    row = tokens()[:1]
    packed = jnp.concatenate([row, row], axis=1), jnp.arange(2 * T)[None] // T, jnp.arange(2 * T)[None] != 2
    state, ys = module.init_state(1, 2 * T), []
    whole, _ = apply(*packed, state)
    for t in range(T, 2 * T):
        y, state = apply(*(x[:, t : t + 1] for x in packed), state)
        ys.append(y)
    np.testing.assert_allclose(whole[:, T:], jnp.concatenate(ys, axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_form
def test_every_parameter_learns(form):
    """But those of the first step, which has one source and so no choice."""
    _, gradients = unrolled(form)
    dead = {jax.tree_util.keystr(path, simple=True, separator="/")
            for path, g in jax.tree.leaves_with_path(gradients) if not np.abs(g).max() > 0}  # fmt: skip
    first = {"block_0/attnres/query_0", "block_0/attnres/scale_0"}
    assert dead == (first if form.startswith("attnres") else set())


@pytest.mark.parametrize("mixing", ["lite", "sinkhorn"])
def test_mixing_is_doubly_stochastic(mixing):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(24 if mixing == "lite" else 16, 5)), jnp.float32)
    H = hyper.lite(logits, 4) if mixing == "lite" else hyper.sinkhorn(logits.reshape(4, 4, 5))
    assert np.all(H > 0)
    np.testing.assert_allclose(H.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-3)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(depth="attnress"), "config.model.depth='attnress': must be one of"),
        (
            dict(depth="hyper", dense__variant="read", dense__gate="none"),
            "config.model.depth='hyper': must be 'none' with model.dense.var",
        ),
        (dict(hyper__mixing="lite", hyper__streams=6), "config.model.hyper.streams=6: must be at most 5 with mixing"),
        (
            dict(depth="hyper", hyper__mixing="lite", implementation__hyper_connection="reference"),
            "config.model.implementation.hyper_connection='reference': must be '' with model.hyper.mixing='lite'",
        ),
        (
            dict(depth="attnres", implementation__attn_residual="reference", scan_blocks=2),
            "config.model.implementation.attn_residual='reference': must be '' with model.scan_blocks=2",
        ),
        (dict(depth="value", pattern="mamba lstm"), "config.model.depth='value': must be .*; lstm has no value stream"),
        (dict(depth="value", pattern="bi:mamba"), "bi:mamba has no value stream"),
        (dict(depth="mudd", short_conv=4), "config.model.short_conv=4: must be 0 with model.depth='mudd'"),
        (dict(attnres__blocks=0), "config.model.attnres.blocks=0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        backbone.plan(config_of("", **fields))
