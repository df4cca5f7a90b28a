"""Calls of attention, and their outputs by a loop over queries, with every rule written a second time."""

import math

import numpy as np

from seqmodels.kernels.attention.biases import Alibi, Buckets, Kerple, Sandwich
from seqmodels.kernels.attention.masks import BigBird, Fixed, Strided

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = 2, 5, 8, 4, 2, 6


def inputs(keys=QUERIES, kv_heads=KV_HEADS, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    args = dict(
        q=draw.normal(size=(BATCH, LONG if keys == LONG else QUERIES, HEADS, WIDTH)) * 2,
        k=draw.normal(size=(BATCH, keys, kv_heads, WIDTH)) * 2,
        v=draw.normal(size=(BATCH, keys, kv_heads, WIDTH)),
    )
    return {name: np.asarray(value, dtype) for name, value in args.items()}


def random(shape, values, seed=1):
    return np.random.default_rng(seed).integers(0, values, shape).astype(np.int32)


POSITIONS = np.array([[0, 1, 2, 2, 3], [3, 4, 5, 6, 7]], np.int32)
SLOTS = np.broadcast_to(np.arange(KEYS, dtype=np.int32), (BATCH, KEYS))
RING = np.array([[8, 9, 10, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 0, 0, 0]], np.int32)  # row 1: three slots are empty
DOCUMENTS = np.array([[0, 0, 1, 1, 1], [3, 4, 4, 4, 5]], np.int32)
LONG = 13  # keys, and queries, of patterns
WEIGHTS = np.random.default_rng(4).uniform(0.3, 1.5, (HEADS, 8)).astype(np.float32)
GATES = np.cumsum(np.random.default_rng(5).normal(-1, 1, (BATCH, KEYS, HEADS)), axis=1).astype(np.float32)
PACKED = dict(
    segment_ids=np.array([[0] * 6 + [1] * 7, [2] * 13], np.int32),
    positions=np.array([[*range(6), *range(7)], range(2, 15)], np.int32),
)
RING_OPTIONS = dict(
    positions=np.array([[6, 7, 8, 9, 10], [0, 1, 2, 3, 4]], np.int32),
    key_positions=RING,
    key_mask=np.array([[1] * 8, [1] * 5 + [0] * 3], bool),
    window=4,
)
CASES = {  # keys, then options
    "causal": (QUERIES, {}),
    "full": (QUERIES, dict(causal=False, scale=0.7)),
    "full, other keys": (KEYS, dict(causal=False)),
    "window": (QUERIES, dict(window=2)),
    "packed": (QUERIES, dict(segment_ids=DOCUMENTS)),
    "key mask": (QUERIES, dict(key_mask=np.array([[0, 0, 1, 1, 0], [1, 0, 1, 0, 1]], bool))),  # row 0: two see nothing
    "nothing to see": (QUERIES, dict(causal=False, key_mask=np.zeros((BATCH, QUERIES), bool))),
    "cache": (KEYS, dict(positions=POSITIONS, key_positions=SLOTS)),
    "cache of documents in a window": (
        KEYS,
        dict(
            positions=POSITIONS,
            key_positions=SLOTS,
            segment_ids=random((BATCH, QUERIES), 2),
            key_segment_ids=random((BATCH, KEYS), 2),
            key_mask=random((BATCH, KEYS), 4) > 0,
            window=3,
        ),
    ),
    "any order": (QUERIES, dict(positions=np.array([[3, 0, 4, 1, 2], [7, 9, 8, 6, 5]], np.int32))),
    "positions in documents": (
        QUERIES,
        dict(segment_ids=DOCUMENTS, positions=np.array([[0, 1, 0, 1, 2], [6, 0, 1, 2, 0]], np.int32), window=2),
    ),
    "ring": (KEYS, RING_OPTIONS),
    "positions, not causal": (KEYS, dict(positions=POSITIONS, key_positions=RING, causal=False, window=4)),
    "sinks": (QUERIES, dict(window=1, sinks=2)),
    "sinks of documents": (
        QUERIES,
        dict(
            segment_ids=DOCUMENTS, positions=np.array([[0, 1, 0, 1, 2], [6, 0, 1, 2, 0]], np.int32), window=1, sinks=1
        ),
    ),
    "strided": (LONG, dict(pattern=Strided(stride=3))),
    "strided blocks of documents": (LONG, dict(pattern=Strided(stride=2, block=3), **PACKED)),
    "fixed": (LONG, dict(pattern=Fixed(stride=4, summary=2))),
    "fixed blocks, not causal": (LONG, dict(pattern=Fixed(stride=2, block=2), causal=False)),
    "BigBird": (LONG, dict(pattern=BigBird(window=1, first=1, random=2, block=2))),
    "BigBird, not causal": (LONG, dict(pattern=BigBird(window=1, first=1, random=1, block=2, seed=3), causal=False)),
    "softcap": (QUERIES, dict(softcap=1.5)),
    "ALiBi": (QUERIES, dict(bias=Alibi(), bias_weights=WEIGHTS[:, :1])),
    "ALiBi in a ring": (KEYS, dict(RING_OPTIONS, bias=Alibi(), bias_weights=WEIGHTS[:, :1])),
    "KERPLE, capped": (QUERIES, dict(bias=Kerple(), bias_weights=WEIGHTS[:, :2], softcap=2.0, scale=0.8)),
    "Sandwich": (LONG, dict(bias=Sandwich(16), bias_weights=WEIGHTS[:, :1], causal=False)),
    "buckets": (LONG, dict(bias=Buckets(8, 10), bias_weights=WEIGHTS)),
    "buckets, not causal": (LONG, dict(bias=Buckets(8, 10, causal=False), bias_weights=WEIGHTS, causal=False)),
    "gates": (QUERIES, dict(gates=GATES[:, :QUERIES])),
    "gates of documents in a cache": (
        KEYS,
        dict(
            positions=POSITIONS,
            key_positions=SLOTS,
            segment_ids=random((BATCH, QUERIES), 2),
            key_segment_ids=random((BATCH, KEYS), 2),
            gates=GATES[:, 3 : 3 + QUERIES],
            key_gates=GATES[:, :KEYS],
        ),
    ),
}
GRADIENTS = ("bias_weights", "gates", "key_gates")  # of options that have gradients


def bucket(bias, distance):
    """T5's bucket in plain numbers."""
    count, start = bias.count, 0
    if not bias.causal:
        count, start = count // 2, count // 2 if distance < 0 else 0
        distance = abs(distance)
    distance, exact = max(distance, 0), count // 2
    if distance < exact:
        return start + distance
    ratio = math.log(distance / exact) / math.log(bias.farthest / exact)
    return start + min(exact + int(ratio * (count - exact)), count - 1)


BY_HAND = {  # of the weights of a head and i - j
    Alibi: lambda bias, w, distance: -w[0] * abs(distance),
    Kerple: lambda bias, w, distance: -w[0] * math.log(1 + w[1] * abs(distance)),
    Sandwich: lambda bias, w, distance: (
        w[0] * sum(math.cos(distance * 10_000 ** (-2 * k / bias.width)) for k in range(1, bias.width // 2 + 1))
    ),
    Buckets: lambda bias, w, distance: w[bucket(bias, distance)],
}


def chosen(pattern, i, j):
    """Whether a query at i sees a key at j, by the pattern alone."""
    if pattern is None:
        return True
    query, key = i // pattern.block, j // pattern.block
    if isinstance(pattern, Strided):
        return abs(query - key) < pattern.stride or (query - key) % pattern.stride == 0
    if isinstance(pattern, Fixed):
        rest = pattern.stride - key % pattern.stride  # blocks to the end of the key's group
        return query // pattern.stride == key // pattern.stride or rest <= pattern.summary
    if abs(query - key) < pattern.window or min(query, key) < pattern.first:
        return True
    draws = [int(pattern.drawn(np.array([max(query, key)]), n)[0]) for n in range(pattern.random)]
    return min(query, key) in draws


def by_hand(
    q,
    k,
    v,
    *,
    causal=True,
    segment_ids=None,
    key_segment_ids=None,
    key_mask=None,
    positions=None,
    key_positions=None,
    scale=None,
    window=None,
    sinks=0,
    pattern=None,
    softcap=None,
    bias=None,
    bias_weights=None,
    gates=None,
    key_gates=None,
):
    """One query and one head at a time, over an explicit list of the keys that it sees."""
    o = np.zeros_like(q)
    scale = WIDTH**-0.5 if scale is None else scale
    key_ids = segment_ids if key_segment_ids is None else key_segment_ids
    key_positions = positions if key_positions is None else key_positions
    key_gates = gates if key_gates is None else key_gates
    for b, t, h in np.ndindex(q.shape[:3]):
        i = t if positions is None else positions[b, t]
        where = [s if key_positions is None else key_positions[b, s] for s in range(k.shape[1])]
        kv = h // (q.shape[2] // k.shape[2])
        seen = [
            s
            for s, j in enumerate(where)
            if (not causal or i >= j)
            and (window is None or i - j < window or j < sinks)
            and chosen(pattern, i, j)
            and (segment_ids is None or segment_ids[b, t] == key_ids[b, s])
            and (key_mask is None or key_mask[b, s])
        ]
        scores = np.array([scale * q[b, t, h] @ k[b, s, kv] for s in seen])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + np.array([BY_HAND[type(bias)](bias, bias_weights[h], int(i - where[s])) for s in seen])
        if gates is not None:
            scores = scores + np.array([gates[b, t, h] - key_gates[b, s, h] for s in seen])
        if seen:
            weights = np.exp(scores)
            o[b, t, h] = weights @ v[b, seen, kv] / weights.sum()
    return o
