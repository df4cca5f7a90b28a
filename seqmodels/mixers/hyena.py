"""Hyena of order 2 (Poli et al. 2023, arXiv 2302.10866): a long convolution between two gates.

    x1, x2, v = short convolution of x W_in;   y = (x1 (h * (x2 v) + D x2 v)) W_out        *: convolution over time
    h_k = window(k) MLP(features(k))           the filter is a function of the distance k, one for each channel

There is no state of a constant size: a token needs all earlier inputs of the convolution. So decoding keeps them in a
cache of `max_length` tokens, as attention does, and takes operations in proportion to it for each token, and the filter
is computed anew in each call.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.hyena import HYENA
from seqmodels.kernels.tuning import UNROLLED
from seqmodels.layers.kv_cache import EMPTY, document_numbers, positions_in_row
from seqmodels.layers.parameter import normal, parameter, residual_std, uniform, zeros
from seqmodels.parallel import long_conv, short_conv
from seqmodels.sequence import Sequence

Cache = dict[str, jax.Array]

FAST, SLOW, TARGET = 0.3, 1.5, 1e-2  # shares of the length at which the windows fall to TARGET, as in the authors' code


def features(count: int, length: int, bands: int) -> jax.Array:
    """[K, 1 + 2 bands] of the distances 0, .., K - 1: the distance over `length`, and cosines and sines of it."""
    t = jnp.arange(count, dtype=jnp.float32)[:, None] / length
    angles = 2 * jnp.pi * t * jnp.linspace(1e-4, bands - 1, bands)
    return jnp.concatenate([t, jnp.cos(angles), -jnp.sin(angles)], axis=1)


def window(count: int, length: int, channels: int) -> jax.Array:
    """[K, E]: exponentials that fall to TARGET at SLOW (the first channel) to FAST (the last) times `length`."""
    rates = -math.log(TARGET) * jnp.linspace(1 / SLOW, 1 / FAST, channels)
    return jnp.exp(-rates * jnp.arange(count)[:, None] / length)


def put(cache: Cache, u: jax.Array, document: jax.Array, place: jax.Array, mask: jax.Array | None) -> Cache:
    """The cache with the real tokens of u [B, T, E] at their places [B, T] in the row; those beyond it are lost."""
    batch, slots = cache["document"].shape
    kept = jnp.ones(document.shape, bool) if mask is None else mask
    where = jnp.arange(batch)[:, None], jnp.where(kept, place, slots)  # an index past the end is dropped
    return dict(
        u=cache["u"].at[where].set(u.astype(cache["u"].dtype), mode="drop"),
        document=cache["document"].at[where].set(document, mode="drop"),
        length=cache["length"] + jnp.sum(kept, axis=1, dtype=jnp.int32),
    )


def read_one(cache: Cache, taps: jax.Array, document: jax.Array, place: jax.Array) -> jax.Array:
    """The convolution at one token a row: [B, E] float32.

    Args:
        taps: [S, E], the first with the skip; document, place: [B] of the token, which is in the cache.
    """
    back = place[:, None] - jnp.arange(len(taps))  # [B, S]
    seen = (back >= 0) & (cache["document"] == document[:, None])
    terms = taps[jnp.maximum(back, 0)] * cache["u"]
    return jnp.sum(jnp.where(seen[..., None], terms, 0), axis=1)


class Hyena(Branch):
    """Hyena mixer. Its options are declared in seqmodels/fields/hyena.py."""

    length: int = HYENA["length"]
    conv: int = HYENA["conv"]
    filter_width: int = HYENA["filter_width"]
    bands: int = HYENA["bands"]
    frequency: float = HYENA["frequency"]

    options = HYENA
    operations = ("long_conv", "short_conv")
    biased = True

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """conv [B, W - 1, 3 E] float32; u [B, max_length, E], document [B, max_length] and length [B], the cache."""
        if max_length is None or max_length < 1:
            raise ValueError(
                f"hyena: max_length={max_length}: must be at least 1, the tokens that its cache has room for"
            )
        return dict(
            conv=jnp.zeros((batch, self.conv - 1, 3 * self.width), jnp.float32), **self.empty(batch, max_length)
        )

    @nn.nowrap
    def empty(self, batch: int, slots: int) -> Cache:
        """A cache without tokens."""
        return dict(
            u=jnp.zeros((batch, slots, self.width), self.dtype),
            document=jnp.full((batch, slots), EMPTY, jnp.int32),
            length=jnp.zeros((batch,), jnp.int32),
        )

    @nn.nowrap
    def flops(self, length: int) -> float:
        """About those of the gates and of the convolution, whose halves of halves have three transforms each."""
        return (5 * math.log2(max(length, 2)) ** 2 + 2) * self.width

    @nn.nowrap
    def taps(self, count: int) -> jax.Array:
        """The filters [K, E] float32 of K taps, with the skip."""
        z = features(count, self.length, self.bands)
        for i in range(3):
            z = jnp.sin(self.filter_layer(f"filter_{i}", z, self.filter_width))
        h = z @ parameter(
            self,
            "filter_out",
            (self.filter_width, self.width),
            (None, "inner"),
            uniform(self.filter_width**-0.5),
            decay=False,
        )
        skip = parameter(self, "D", (self.width,), ("inner",), normal(1.0))
        return (h * window(count, self.length, self.width)).at[0].add(skip)

    @nn.nowrap
    def filter_layer(self, name: str, z: jax.Array, units: int) -> jax.Array:
        """frequency (z W + b), what the sine takes: [K, units]."""
        fan_in = z.shape[1]
        fresh = uniform(fan_in**-0.5)
        weight = parameter(self, name, (fan_in, units), (None, None), fresh, decay=False)
        bias = parameter(self, f"{name}_bias", (units,), (None,), fresh)
        start = nn.initializers.constant(self.frequency)
        return parameter(self, f"{name}_frequency", (units,), (None,), start) * (z @ weight + bias)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the cache with these tokens. Without a state it holds only these tokens."""
        x, width = real(x, seq, self.dtype), self.width
        inward = (width, 3 * width), ("embed", "inner"), normal(width**-0.5)
        z = checkpoint_name(x @ self.matrix("in_proj", *inward), "projected")
        if self.bias:
            z = z + parameter(self, "in_bias", (3 * width,), ("inner",), zeros, dtype=self.dtype)
        kernel = parameter(self, "conv_weight", (self.conv, 3 * width), ("conv", "inner"), uniform(self.conv**-0.5))
        bias = parameter(self, "conv_bias", (3 * width,), ("inner",), uniform(self.conv**-0.5))
        past = dict(initial_state=None if state is None else state["conv"])
        z, conv = short_conv(
            z, kernel, bias, implementation=self.implementation.get("short_conv"), **past, **seq.documents()
        )
        gate, second, v = jnp.split(z, 3, axis=2)
        y, cache = self.convolve(real(second * v, seq, self.dtype), seq, state)
        outward = (width, width), ("inner", "embed"), normal(residual_std(self.layers))
        y = (gate * checkpoint_name(y, "scan")) @ self.matrix("out_proj", *outward)
        if self.bias:
            y = y + parameter(self, "out_bias", (width,), ("embed",), zeros, dtype=self.dtype)
        return y, dict(cache, conv=conv)

    @nn.nowrap
    def convolve(self, u: jax.Array, seq: Sequence, cache: State) -> tuple[jax.Array, Cache]:
        """The convolution [B, T, E] of u and the earlier tokens in the cache, and the cache with u.

        Tokens that find no free slot have NaN as output.

        Raises:
            ValueError: T tokens without padding do not fit even into an empty cache.
        """
        batch, length, _ = u.shape
        slots = length if cache is None else cache["u"].shape[1]
        if length > slots and seq.mask is None:
            raise ValueError(
                f"hyena: {length} tokens do not fit into a cache of {slots} slots; "
                f"init_state(batch, max_length) needs max_length >= {length}, all tokens of the row"
            )
        taps, implementation = self.taps(slots), self.implementation.get("long_conv")
        old = self.empty(batch, slots) if cache is None else cache
        document = document_numbers(seq, batch, length, jnp.maximum(jnp.max(old["document"], axis=1), 0))
        place = positions_in_row(old["length"], length, seq.mask)
        new = put(old, u, document, place, seq.mask)
        if cache is None:
            return long_conv(u, taps, implementation=implementation, **seq.documents()), new
        if length <= UNROLLED:
            y = jnp.stack([read_one(new, taps, document[:, t], place[:, t]) for t in range(length)], axis=1)
        else:  # of the whole cache at once
            whole = long_conv(new["u"], taps, segment_ids=new["document"], implementation=implementation)
            y = jnp.take_along_axis(whole, jnp.minimum(place, slots - 1)[..., None], axis=1)
        return jnp.where((place < slots)[..., None], real(y, seq, self.dtype), jnp.nan), new
