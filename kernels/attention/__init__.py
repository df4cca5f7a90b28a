"""Softmax attention with grouped heads, windows, sparse patterns, biases, packed documents and caches."""

import functools
from typing import Any

import jax

from seqmodels.kernels import dispatch
from seqmodels.kernels.attention import cudnn, mosaic_gpu, reference, splash, strips, xla
from seqmodels.kernels.attention.apart import apart, hide
from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.biases import Bias
from seqmodels.kernels.attention.masks import Mask, Pattern
from seqmodels.kernels.attention.visible import reached, visible
from seqmodels.kernels.axes import Axes, Layout

BACKENDS = {
    "reference": reference,
    "xla": xla,
    "strips": strips,
    "cudnn": cudnn,
    "mosaic_gpu": mosaic_gpu,
    "splash": splash,
}
# measured on an H200, jax 0.11.2, and on a CPU core, jax 0.10.2
WINNERS = {"cuda": ("mosaic_gpu", "cudnn", "xla"), "cpu": ("strips", "xla"), "default": ("xla",)}
IMPLEMENTATIONS = tuple(BACKENDS)


def axes(**arguments: Any) -> Layout:
    """Logical axes of the arrays and of the result of `attention`.

    Time may be split if there are as many keys as queries. Otherwise it stays whole: each query sees all keys.
    """
    q, k = arguments.get("q"), arguments.get("k")
    time = "length" if q is not None and k is not None and q.shape[1] == k.shape[1] else None
    queries, keys, tokens = ("batch", time, "heads", None), ("batch", time, "kv_heads", None), ("batch", time)
    names = ("segment_ids", "key_segment_ids", "key_mask", "positions", "key_positions")
    weights = dict(bias_weights=("heads", None), gates=("batch", time, "heads"), key_gates=("batch", time, "heads"))
    arrays: dict[str, Axes] = dict(q=queries, k=keys, v=keys, **dict.fromkeys(names, tokens), **weights)
    return Layout(arrays, (queries,), together=("heads", "kv_heads"))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    pattern: Pattern | None = None,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Bias | None = None,
    bias_weights: jax.Array | None = None,
    gates: jax.Array | None = None,
    key_gates: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_t = sum_s softmax_s(score_ts) v_s over the keys s that query t sees, where

        score_ts = cap(scale q_t . k_s) + bias(positions_t, key_positions_s) + gates_t - key_gates_s.

    Query t sees a key if the key is in the same document, not later than the query, within the window, chosen by the
    pattern, and not masked. The keys may come in any order, as in a ring-buffer cache: only the positions decide which
    token is later.

    Args:
        q: [B, T, H, d].
        k, v: [B, S, Hkv, d]; H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        causal: query t sees no key s with key_positions[s] > positions[t].
        window: how many positions a query sees, counted back from and including its own (key_positions[s] >
            positions[t] - window).
        sinks: how many positions a query sees besides the window, from position 0 on: Xiao et al. 2024 (StreamingLLM),
            arXiv 2309.17453.
        pattern: which keys a query sees besides these rules, such as `masks.Strided(stride=8, block=64)`.
        segment_ids: [B, T] int32, document of each query, which sees the keys of equal id only. Infinity and NaN in
            one document reach no output and no gradient of another, with every implementation.
        key_segment_ids: [B, S] int32. None: the queries' (then S = T).
        key_mask: [B, S] bool, False on keys that no query sees, such as empty slots. Values there, even NaN, affect
            no output and no gradient.
        positions: [B, T] int32, position of each query in its document, or in its row: without sinks, pattern and a
            bias for which it matters, only the differences between tokens of one document count. None: query t is at
            t, and key s at s.
        key_positions: [B, S] int32, position of each key, counted as for queries. None: the queries' (then S = T).
        scale: None: d**-0.5.
        softcap: scores become softcap tanh(score / softcap), as in Gemma 2. None: they stay.
        bias: a function of positions, such as `biases.Alibi()`.
        bias_weights: [H, bias.size], the weights of the bias in each head, which have gradients.
        gates: [B, T, H] float32, the sum of the logarithms of a document's forget gates up to and including each
            query (Lin et al. 2025, Forgetting Transformer, arXiv 2503.02130). Sums of -1e4 have an error of 1e-3.
            They have no gradient, because the softmax does not change with a number added to all scores of a query.
        key_gates: [B, S, H] float32, the same of each key, which has a gradient. None: the queries' (then S = T), and
            the gradient is that of `gates`.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest on the platform.

    Returns:
        o [B, T, H, d] in the dtype of q; zero for a query that sees no key. The softmax has at least float32 precision.

    Raises:
        ValueError: shapes or options that do not fit.
        seqmodels.kernels.dispatch.UnsupportedError: the named implementation cannot serve.
    """
    inputs, tokens, options = arguments(
        q,
        k,
        v,
        causal=causal,
        window=window,
        sinks=sinks,
        pattern=pattern,
        segment_ids=segment_ids,
        key_segment_ids=key_segment_ids,
        key_mask=key_mask,
        positions=positions,
        key_positions=key_positions,
        scale=scale,
        softcap=softcap,
        bias=bias,
        bias_weights=bias_weights,
        gates=gates,
        key_gates=key_gates,
    )
    attend = functools.partial(_by_backend, implementation, options)
    if segment_ids is None:
        return attend(hide(inputs, key_mask), tokens)
    if q.shape[1] > 1:
        return apart(attend, functools.partial(reached, mask=options.mask), hide(inputs, key_mask), tokens)
    # A single query, as in decoding: what it does not see is selected away, in the products that read the cache anyway.
    seen = visible((1, k.shape[1]), options.mask, tokens)
    assert seen is not None  # it is None only without documents
    return attend(hide(inputs, seen[:, 0]), tokens)


def arguments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    pattern: Pattern | None,
    scale: float | None,
    softcap: float | None,
    bias: Bias | None,
    bias_weights: jax.Array | None,
    gates: jax.Array | None,
    key_gates: jax.Array | None,
    **tokens: jax.Array | None,
) -> tuple[Inputs, Tokens, Options]:
    """The arguments of `attention` as implementations take them."""
    key_gates = gates if key_gates is None else key_gates
    inputs = Inputs(q, k, v, bias_weights, None if gates is None else jax.lax.stop_gradient(gates), key_gates)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = Options(Mask(causal, window, sinks, pattern), scale, softcap, bias)
    check(inputs, Tokens(**tokens), options)
    return inputs, Tokens(**tokens), options


def _by_backend(implementation: str | None, options: Options, inputs: Inputs, tokens: Tokens) -> jax.Array:
    """`attention` by one of its implementations."""
    mask, biased = options.mask, options.bias is not None or inputs.gates is not None
    placed = any(x is not None for x in (tokens.key_segment_ids, tokens.key_mask, tokens.positions))
    facts = dict(
        dtype=str(inputs.q.dtype),
        queries=inputs.q.shape[1],
        keys=inputs.k.shape[1],
        width=inputs.q.shape[3],
        scores=inputs.q.shape[0] * inputs.q.shape[2] * inputs.q.shape[1] * inputs.k.shape[1],
        causal=mask.causal,
        masked=placed or tokens.segment_ids is not None,
        placed=placed,
        positioned=tokens.positions is not None,
        other_places=tokens.key_positions is not None,
        scale=options.scale,
        window=mask.window,
        sinks=mask.sinks,
        pattern=mask.pattern is not None,
        block=None if mask.pattern is None else mask.pattern.block,
        biased=biased,
        capped=options.softcap is not None,
    )

    def call(backend, inputs, tokens):
        return backend.attention(inputs, tokens, options)

    return dispatch.dispatch("attention", BACKENDS, WINNERS, implementation, facts, call, inputs, tokens)


choose = functools.partial(dispatch.choose, "attention", BACKENDS, WINNERS)


def check(inputs: Inputs, tokens: Tokens, options: Options) -> None:
    """Raise a ValueError unless the arguments fit together."""
    q, k, v, bias_weights, gates, key_gates = inputs
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention: q must be [B, T, H, d] and k, v [B, S, Hkv, d] with H a multiple of Hkv, "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    for name, of_keys, of_queries in (
        ("segment_ids", tokens.key_segment_ids, tokens.segment_ids),
        ("positions", tokens.key_positions, tokens.positions),
        ("gates", key_gates, gates),
    ):
        if of_keys is not None and of_queries is None:
            raise ValueError(f"attention: key_{name} were given without {name}")
    if (options.bias is None) != (bias_weights is None):
        missing = "bias" if options.bias is None else "bias_weights"
        raise ValueError(f"attention: bias and bias_weights belong together, and {missing} is missing")
    rows, slots, heads = q.shape[:2], k.shape[:2], q.shape[2:3]
    shapes = dict(
        segment_ids=(tokens.segment_ids, rows),
        key_segment_ids=(tokens.segment_ids if tokens.key_segment_ids is None else tokens.key_segment_ids, slots),
        key_mask=(tokens.key_mask, slots),
        positions=(tokens.positions, rows),
        key_positions=(tokens.positions if tokens.key_positions is None else tokens.key_positions, slots),
        gates=(gates, rows + heads),
        key_gates=(key_gates, slots + heads),
        bias_weights=(bias_weights, (*heads, options.bias.size if options.bias is not None else 0)),
    )
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"attention: {name} must be {shape}, got {array.shape}")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"attention: softcap must be greater than 0, got {options.softcap}")
