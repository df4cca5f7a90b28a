"""Times attention forward and with its backward pass, dense and sparse, and records the figures with the memory.

    python benchmarks/attention.py                                        # the shapes for this device
    python benchmarks/attention.py --shapes=1x32768x16x16x64 --masks=causal,window4096,bigbird --by=xla,cudnn
    python benchmarks/attention.py --shapes=8x2048x16x16x64 --masks=causal --by=cudnn,mosaic_gpu,torch

A shape is B x T x H x Hkv x d. Masks are "causal"; "full"; "windowN", the last N tokens; "strided", "fixed" and
"bigbird", patterns of blocks of 512 tokens (strided: the last 4 blocks and every fourth one before; fixed: groups of 4,
of which the last block is seen by all; bigbird: 3 blocks, the first, and 3 random ones); and "documents", each of 1024
tokens. "NAME+documents" and "NAME+padding" are such a mask by the positions in each of these documents, and by those of
real tokens, of which every eighth is none. "torch" is torch's scaled_dot_product_attention, for causal and full masks
on an NVIDIA GPU.

A time is the median of --repeat timings of calls for 30 ms each, from random numbers. The memory is what the compiled
program needs beside its arguments and results. "left" is the part of the tiles of 512 x 512 causal (or all) scores in
which a query sees a key, and "gain" the time of the causal mask over this mask's, times "left": 1 if the time falls in
proportion. Rows are written to benchmarks/results/attention_<device>.json.
"""

import datetime
import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before JAX is loaded

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.grouped_matmul import torch_measure
from benchmarks.kernels import choices
from benchmarks.rates import measure
from benchmarks.record import RESULTS, commit, device_name, record, slug
from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.kernels import attention as op
from seqmodels.kernels.attention import tiles
from seqmodels.kernels.attention.arguments import Tokens
from seqmodels.kernels.attention.masks import BigBird, Fixed, Mask, Strided

PASSES = ("forward", "forward+backward")
SHAPES = {
    "cpu": "2x1024x4x4x64,1x4096x4x4x64",
    "default": "8x2048x16x16x64,2x8192x16x16x64,1x32768x16x16x64,1x65536x16x16x64",
}
BLOCK = 512
PATTERNS = dict(
    strided=Strided(4, BLOCK), fixed=Fixed(4, 1, BLOCK), bigbird=BigBird(window=3, first=1, random=3, block=BLOCK)
)
DOCUMENT = 1024
KEY = ("op", "implementation", "shape", "mask", "dtype", "pass", "device")
ROW = "{:10} {:20} {:12} {:17} {:>9} {:>10} {:>6} {:>6}"


def mask_of(name: str) -> Mask:
    """The mask that a name stands for. Raises UserError if there is none."""
    name, _, rest = name.partition("+")
    if rest not in ("", "documents", "padding"):
        raise UserError(f"--masks={name}+{rest}: allowed are {name}+documents and {name}+padding")
    if name in ("causal", "full", "documents"):
        return Mask(causal=name != "full")
    if name in PATTERNS:
        return Mask(pattern=PATTERNS[name])
    if name.startswith("window") and name[6:].isdecimal() and int(name[6:]) > 0:
        return Mask(window=int(name[6:]))
    raise UserError(f"--masks={name}: allowed are causal, full, documents, windowN, {', '.join(PATTERNS)}")


def left(mask: Mask, length: int) -> float:
    """The part of the tiles of a causal mask (or of all, if the mask is not causal) in which a query sees a key."""
    side = tiles.side(Tokens().queries(length), BLOCK)
    count = [np.sum(tiles.plan(one, side, side).visits) for one in (mask, Mask(causal=mask.causal))]
    return float(count[0] / count[1])


def arrays(shape: tuple[int, ...], dtype: Any) -> dict[str, jax.Array]:
    """q, k and v of normal numbers, and the gradient of o."""
    batch, length, heads, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = dict(q=heads, k=kv_heads, v=kv_heads, do=heads)
    draw = functools.partial(jax.random.normal, dtype=dtype)
    return {n: draw(key, (batch, length, h, width)) for key, (n, h) in zip(keys, sizes.items(), strict=True)}


def tokens_of(name: str, batch: int, length: int) -> dict[str, jax.Array]:
    """Arguments that describe the tokens of a mask."""
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if name.endswith("documents"):
        ids = dict(segment_ids=place // DOCUMENT)
        return ids if name == "documents" else ids | dict(positions=place % DOCUMENT)
    if name.endswith("padding"):
        real = place % 8 != 7
        ids = dict(segment_ids=jnp.where(real, 0, -2), key_segment_ids=jnp.where(real, 0, -1))  # as models give them
        return ids | dict(positions=place - place // 8)
    return {}


def call(by: str, name: str, one: str) -> Callable[[dict], Any]:
    """A function of the arrays: o, or the gradients of q, k and v."""
    mask = mask_of(name)

    def attend(q, k, v):
        rules = dict(causal=mask.causal, window=mask.window, pattern=mask.pattern)
        return op.attention(q, k, v, **tokens_of(name, *q.shape[:2]), **rules, implementation=by)

    def run(a):
        o, pull = jax.vjp(attend, a["q"], a["k"], a["v"])
        return o if one == "forward" else pull(a["do"])

    return run


def torch_call(mask: Mask, one: str) -> Callable[[dict], Any]:
    """The same by torch, from tensors [B, H, T, d]."""
    import torch

    def run(a):
        o = torch.nn.functional.scaled_dot_product_attention(
            a["q"], a["k"], a["v"], is_causal=mask.causal, enable_gqa=a["q"].shape[1] != a["k"].shape[1]
        )
        return o if one == "forward" else torch.autograd.grad(o, (a["q"], a["k"], a["v"]), a["do"])

    return run


def torch_arrays(a: dict[str, jax.Array], one: str) -> dict[str, Any]:
    import torch

    tensors = {name: torch.from_dlpack(x).transpose(1, 2).contiguous() for name, x in a.items()}
    return {name: x.requires_grad_(one != "forward" and name != "do") for name, x in tensors.items()}


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    define_flag = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    define_flag("shapes", "", "B x T x H x Hkv x d, several with commas.")
    define_flag("masks", f"causal,window{BLOCK},{','.join(PATTERNS)},documents", "Masks.")
    define_flag("by", "", "Implementations, and torch; xla, and on a GPU cudnn, mosaic_gpu and torch, if left out.")
    define_flag("passes", ",".join(PASSES), "Passes.")
    define_flag("dtype", "", "bfloat16 or float32; float32 on a CPU if left out.")
    define_flag("platform", "", "cpu, gpu or tpu; what is there if left out.")
    define_flag("out", "", "File of results; by device if left out.")
    flags.DEFINE_integer("repeat", 7, "Timings, of which the median counts.", flag_values=flag_values, lower_bound=1)


def main(flag_values: flags.FlagValues) -> int:
    cli.use_platform(flag_values.platform)
    device = jax.devices()[0]
    cpu, gpu = device.platform == "cpu", device.platform == "gpu"
    on_gpu = ["cudnn", "mosaic_gpu", "torch"] if gpu else []
    names = choices("by", flag_values.by, (*op.IMPLEMENTATIONS, "torch"), ["xla", *on_gpu])
    passes = choices("passes", flag_values.passes, PASSES, PASSES)
    dtype = flag_values.dtype or ("float32" if cpu else "bfloat16")
    path = Path(flag_values.out or RESULTS / f"attention_{slug(device_name(device))}.json")
    masks = {name: mask_of(name) for name in flag_values.masks.split(",")}
    print(f"{device_name(device)}, jax {jax.__version__}, {dtype}")
    print(ROW.format("by", "shape", "mask", "pass", "ms", "MiB", "left", "gain"), flush=True)
    for text in (flag_values.shapes or SHAPES["cpu" if cpu else "default"]).split(","):
        sizes = text.split("x")
        if len(sizes) != 5 or not all(n.isdecimal() and int(n) > 0 for n in sizes):
            raise UserError(f"--shapes={text}: must be B x T x H x Hkv x d, as 8x2048x16x16x64")
        shape = tuple(map(int, sizes))
        a, causal = arrays(shape, dtype), {}
        for by, one, (name, mask) in itertools.product(names, passes, masks.items()):
            if by == "torch" and name not in ("causal", "full"):
                continue
            try:
                seconds, memory = timed(by, name, one, a, flag_values.repeat)
            except Exception as problem:  # such as what an implementation does not take; the other rows are measured
                message = " ".join(str(problem).split())[:160]
                print(ROW.format(by, text, name, one, *"!" * 4), f"{type(problem).__name__}: {message}", flush=True)
                continue
            causal |= {(by, one): seconds} if name == "causal" else {}
            part = left(mask, shape[1])
            gain = causal[by, one] / seconds * part if (by, one) in causal and not tokens_of(name, 1, 8) else None
            shown = f"{seconds * 1e3:.3f}", "-" if memory is None else f"{memory / 2**20:.0f}", f"{part:.2f}"
            print(ROW.format(by, text, name, one, *shown, "-" if gain is None else f"{gain:.2f}"), flush=True)
            row = dict(op="attention", implementation=by, shape=list(shape), mask=name, dtype=dtype, left=part)
            row |= {"pass": one, "ms": seconds * 1e3, "bytes": memory, "device": device_name(device)}
            row |= dict(jax=jax.__version__, date=datetime.date.today().isoformat(), commit=commit())
            record(path, row, KEY)
    return 0


def timed(by: str, name: str, one: str, a: dict, repeat: int) -> tuple[float, int | None]:
    """Seconds, and bytes of temporary arrays."""
    if by == "torch":
        return torch_measure(torch_call(mask_of(name), one), torch_arrays(a, one), repeat), None
    compiled = jax.jit(call(by, name, one)).lower(a).compile()
    return measure(compiled, [a], repeat), compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
