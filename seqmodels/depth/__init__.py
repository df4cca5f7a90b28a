"""Connections across depth beside the residual stream: docs/architecture.md says what one may do."""

import functools
from typing import Any

import jax.numpy as jnp

from seqmodels import pattern
from seqmodels.branch import Branch
from seqmodels.branches import BRANCHES
from seqmodels.depth.attnres import AttnRes
from seqmodels.depth.connection import Carry, Connection
from seqmodels.depth.dense import FUSIONS, Dense
from seqmodels.depth.denseformer import DenseFormer
from seqmodels.depth.hyper import Hyper
from seqmodels.depth.hyper_fused import FusedHyper
from seqmodels.depth.mudd import Mudd
from seqmodels.depth.value import ValueResidual
from seqmodels.fields import refuse
from seqmodels.layers.norm import norm_of
from seqmodels.mixers.linked import Linked
from seqmodels.pattern import BOTH_WAYS, name_of

__all__ = ["Carry", "Connection", "check", "check_links", "connection_of", "growing", "kind", "operations"]

PLAIN, DENSE = "plain", "dense"


def kind(config: Any) -> str:
    """Name of the model's connection. The module has the same name in the tree of parameters."""
    if config.dense.variant != "none":
        return DENSE
    return PLAIN if config.depth == "none" else config.depth


def growing(config: Any) -> int:
    """Super-blocks at the bottom whose carry gets other parts, so that no scan can run them."""
    return int(kind(config) == "value")


def operations(config: Any) -> tuple[str, ...]:
    """Operations of `seqmodels.kernels` that the connection runs by itself: only if named, else it is for XLA alone."""
    used = {"hyper": "hyper_connection", "attnres": "attn_residual"}.get(kind(config))
    return (used,) if used and config.implementation[used] else ()


def check(config: Any, words: set[str]) -> None:
    """Whether the branches of the pattern's words, and other fields of the model, fit its connection.

    Raises UserError where they do not.
    """
    if kind(config) == "value":
        of = {word: BRANCHES[name_of(word)] for word in words}
        lacking = [word for word in of if of[word].mixes_time and (word.startswith(BOTH_WAYS) or not of[word].valued)]
        if lacking or not any(branch.mixes_time for branch in of.values()):
            able = ", ".join(name for name in BRANCHES if BRANCHES[name].valued)
            have = f"; {', '.join(sorted(lacking))} has no value stream" if lacking else ""
            refuse("model.depth", "value", f"another one unless all mixers of model.pattern are of {able}{have}")
    if kind(config) == "mudd" and config.short_conv:
        refuse("model.short_conv", config.short_conv, "0 with model.depth='mudd', whose mixers read several inputs")
    if "attn_residual" in operations(config) and config.scan_blocks:
        allowed = f"'' with model.scan_blocks={config.scan_blocks}: its sources are separate arrays"
        refuse("model.implementation.attn_residual", config.implementation.attn_residual, allowed)
    if "hyper_connection" in operations(config) and (mixing := config.hyper.mixing) != "identity":
        allowed = f"'' with model.hyper.mixing={mixing!r}: it does not mix the streams"
        refuse("model.implementation.hyper_connection", config.implementation.hyper_connection, allowed)


def check_links(config: Any, word: str) -> None:
    """Whether DenseSSM's options fit the state of the branch that is this word of the pattern.

    Raises UserError where they do not.
    """
    for field, values in FUSIONS[BRANCHES[word].link].allowed.items():
        if config.dense[field] not in values:
            some = "one of " if len(values) > 1 else ""
            choices = f"{some}{', '.join(map(repr, values))} with {word} in model.pattern"
            refuse(f"model.dense.{field}", config.dense[field], choices)


def connection_of(config: Any, branches: list[Branch], steps: int, sources: int = 0, **parent: Any) -> Connection:
    """The connection of one block, or of the end of the model.

    Args:
        config: config.model.
        branches: the block's branches, in order. DenseSSM links the first that has a stream.
        steps: number of the block's steps; 0 for the end of the model.
        sources: how many streams below it reads, for DenseSSM.
    """
    name, blocks = kind(config), pattern.parse(config.pattern)
    scanned, eps = config.scan_blocks > 0, config.norm_eps
    dtype = jnp.dtype(config.dtype)
    if name == PLAIN:
        return Connection(**parent)
    if name == "attnres":
        total = config.repeats * sum(map(len, blocks))
        named = config.implementation.attn_residual if operations(config) else ""
        fields = dict(total=total, scanned=scanned, eps=eps, dtype=dtype, implementation=named)
        return AttnRes(config.attnres, config.width, steps or int(config.attnres.form != "delta"), **fields, **parent)
    if name == "denseformer":
        return DenseFormer(config.width, steps, config.repeats * len(blocks), scanned, **parent)
    if name == "value":
        return ValueResidual(tuple(dict.fromkeys(type(b).__name__ for b in branches if b.valued)), **parent)
    if name == "mudd":
        ways, norm = branches[0].ways if branches else (), functools.partial(norm_of, config)
        return Mudd(ways, config.width, steps, config.repeats * len(blocks), scanned, eps, norm, dtype, **parent)
    if name == "hyper":
        fields = dict(options=config.hyper, width=config.width, steps=steps, eps=eps, dtype=dtype, **parent)
        if not operations(config):
            return Hyper(**fields)
        return FusedHyper(implementation=config.implementation.hyper_connection, **fields)
    return _dense(config, branches, sources, **parent)


def _dense(config: Any, branches: list[Branch], sources: int, **parent: Any) -> Dense:
    linked = next((branch for branch in branches if isinstance(branch, Linked)), None)
    if linked is None:
        fields: dict[str, Any] = dict(link="", sizes={}, dtype=config.dtype, implementation={})
    else:
        inner, state = linked.stream_sizes
        sizes = dict(inner=inner, state=state)
        if linked.link == "matrix":
            sizes["shape"] = linked.state_shape
        if linked.link == "lti":
            sizes["read_flops"] = linked.read_flops
        fields = dict(link=linked.link, sizes=sizes, dtype=linked.dtype, implementation=linked.implementation)
    keeps = config.dense.variant == "read" and not config.scan_blocks and config.remat == "none"
    return Dense(config.dense, config.width, sources, keeps=keeps, **fields, **parent)
