"""The stack of blocks after a layer pattern, between a model's input and its head.

A pattern such as "mamba" or "mamba mamba attention+mlp" names the blocks of one group: a mixer, and after "+" a channel
mixer. The group is repeated. With DenseSSM the stack carries a window of the last m hidden streams from block to block.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from seqmodels.channels.mlp import Mlp
from seqmodels.dense import DenseFusion
from seqmodels.dense_matrix import MatrixFusion
from seqmodels.errors import UserError
from seqmodels.layers.norm import RMSNorm
from seqmodels.mixers import MIXERS
from seqmodels.sequence import Sequence

CHANNEL_MIXERS = {"mlp": Mlp}
REMAT = {  # what of a block is kept for the backward pass; the rest is computed again
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mixer": jax.checkpoint_policies.save_only_these_names("projected", "stream"),  # again: norms, the scan
    "projected": jax.checkpoint_policies.save_only_these_names("projected"),  # again: norms, convolutions, the scan
    "rescan": jax.checkpoint_policies.save_only_these_names(  # again: the scan over time, casts, gates
        "normed", "projected", "stream", "readout", "statistics"
    ),
    "scan": jax.checkpoint_policies.save_only_these_names("scan"),  # again: all but the scan over time
    "streams": jax.checkpoint_policies.save_only_these_names("stream"),
}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One block of the stack.

    Attributes:
        mixer, channel: names; channel is "" where there is no channel mixer.
        sources: DenseSSM: how many hidden streams below it reads.
    """

    mixer: str
    channel: str
    sources: int = 0


def parse_pattern(pattern: str) -> list[tuple[str, str]]:
    """[(mixer, channel mixer or ""), ...] of one group. Raises UserError for a name that is not registered."""
    blocks = [tuple((block + "+").split("+")[:2]) for block in pattern.split()]
    for mixer, channel in blocks:
        for name, table in ((mixer, MIXERS), (channel or "mlp", CHANNEL_MIXERS)):
            if name not in table:
                raise UserError(f"model.pattern is {pattern!r}; {name!r} is none of {', '.join(table)}")
    if not blocks:
        raise UserError("model.pattern is empty; it must name a mixer such as 'mamba' or 'attention+mlp'")
    return blocks


def has_stream(mixer: str) -> bool:
    """Whether DenseSSM can read the mixer's hidden state."""
    return hasattr(MIXERS[mixer], "write")


def plan(config) -> list[BlockSpec]:
    """Every block from bottom to top. DenseSSM counts only the blocks with a hidden stream."""
    dense = config.dense
    specs, streams = [], 0
    for mixer, channel in parse_pattern(config.pattern) * config.repeats:
        sources = 0
        if dense.variant != "none" and has_stream(mixer):
            sources = min(dense.depth, streams) if streams % dense.every == 0 else 0
            streams += 1
        specs.append(BlockSpec(mixer, channel, sources))
    if dense.variant != "none" and not streams:
        raise UserError(
            f"model.dense.variant is {dense.variant!r}, but no mixer of {config.pattern!r} has hidden states"
        )
    return specs


def scanned(config) -> tuple[int, int]:
    """Blocks at the bottom that are unrolled, and the number of super-blocks above them that are scanned over.

    Unrolled are the first super-blocks that do not yet have m streams below them.
    """
    blocks = plan(config)
    if not config.scan_blocks:
        return len(blocks), 0
    if config.get("remat_blocks", 0):
        raise UserError(
            f"model.remat_blocks is {config.remat_blocks}; it must be 0 with model.scan_blocks={config.scan_blocks}"
        )
    if config.repeats % config.scan_blocks:
        raise UserError(
            f"model.scan_blocks is {config.scan_blocks}; it must divide model.repeats, which is {config.repeats}"
        )
    size = len(parse_pattern(config.pattern)) * config.scan_blocks
    groups = [blocks[i : i + size] for i in range(0, len(blocks), size)]
    first = 0
    while first < len(groups) and groups[first] != groups[-1]:
        first += 1
    if any(group != groups[-1] for group in groups[first:]):
        raise UserError(f"model.dense.every is {config.dense.every}; with scan_blocks it must divide the super-block")
    needed = 0 if config.dense.variant == "none" else config.dense.depth
    while first < len(groups) and sum(has_stream(spec.mixer) for spec in blocks[: first * size]) < needed:
        first += 1
    return first * size, len(groups) - first


def mixer_of(config, spec: BlockSpec, **parent) -> nn.Module:
    """The block's mixer: its fields are those of config.model.<name>."""
    layers = config.repeats * len(config.pattern.split())
    options = {"implementation": dict(config.implementation), **config.get(spec.mixer, {})}
    return MIXERS[spec.mixer](width=config.width, layers=layers, dtype=jnp.dtype(config.dtype), **options, **parent)


def dense_of(config, spec: BlockSpec, mixer, **parent) -> DenseFusion | None:
    """The block's DenseSSM fusion, if it has one."""
    if not spec.sources and (config.dense.variant != "output" or not has_stream(spec.mixer)):
        return None
    fields = {k: v for k, v in config.dense.items() if k not in ("depth", "every")}
    inner, state = mixer.stream_sizes
    sizes = dict(width=config.width, inner=inner, state=state, sources=spec.sources)
    fusion = MatrixFusion if hasattr(type(mixer), "state_shape") else DenseFusion
    return fusion(**sizes, **fields, dtype=mixer.dtype, implementation=mixer.implementation, **parent)


def block_state(config, spec: BlockSpec, batch: int, max_length: int):
    """A block's state before the first token: the mixer's, and CARRY's extra one. Needs no parameters."""
    mixer = mixer_of(config, spec, parent=None)
    dense = dense_of(config, spec, mixer, parent=None)
    state = {"mixer": mixer.init_state(batch, max_length)}
    if dense is not None and (carried := dense.init_state(batch)) is not None:
        state["dense"] = carried
    return state


class Block(nn.Module):
    """x + mixer(norm(x)), then + channel(norm(x)); `window` holds the hidden streams below, the nearest first."""

    config: FrozenConfigDict
    spec: BlockSpec

    def setup(self):
        config, spec = self.config, self.spec
        self.norm = RMSNorm(config.norm_eps)
        self.mixer = mixer_of(config, spec)
        self.dense = dense_of(config, spec, self.mixer)
        self.dropout = nn.Dropout(config.dropout)
        if spec.channel:
            layers = config.repeats * len(config.pattern.split())
            options = dict(width=config.width, layers=layers, dtype=jnp.dtype(config.dtype))
            self.mlp_norm = RMSNorm(config.norm_eps)
            self.mlp = CHANNEL_MIXERS[spec.channel](**options, **config.get(spec.channel, {}))

    def __call__(self, x, seq: Sequence, state, window, deterministic: bool):
        """x [B, T, D], state and window to the new ones."""
        dtype = jnp.dtype(self.config.dtype)
        normed = checkpoint_name(self.norm(x).astype(dtype), "normed")
        state = state or {}
        if self.config.dense.variant == "none" or not has_stream(self.spec.mixer):
            y, mixer_state = self.mixer(normed, seq, state.get("mixer"))
            new_state = {"mixer": mixer_state}
        else:
            y, new_state, stream = self._dense(normed, seq, state, window)
            window = (stream, *window)[: self.config.dense.depth]
        x = x + self.dropout(y, deterministic=deterministic).astype(x.dtype)
        if self.spec.channel:
            y = self.mlp(self.mlp_norm(x).astype(dtype))
            x = x + self.dropout(y, deterministic=deterministic).astype(x.dtype)
        return nn.with_logical_constraint(x, ("batch", "length", None)), new_state, window

    def _dense(self, x, seq, state, window):
        stream, readout = self.mixer.write(x, seq, state.get("mixer"))
        carried = None
        if self.dense is None:
            y, ssm = self.mixer.scan(stream, readout, seq)
        else:
            sources = window[: self.spec.sources]
            y, ssm, carried, stream = self.dense(x, stream, readout, sources, seq, state.get("dense"))
        new_state = {"mixer": self.mixer.new_state(readout, ssm)}
        if carried is not None:
            new_state["dense"] = carried
        return self.mixer.project(y), new_state, stream


class SuperBlock(nn.Module):
    """Several blocks, the body of the scan over layers."""

    config: FrozenConfigDict
    specs: tuple[BlockSpec, ...]
    deterministic: bool

    def setup(self):
        self.block = [rematerialised(self.config)(self.config, spec) for spec in self.specs]

    def __call__(self, carry, state, seq):
        """carry (x, window), with the states of this super-block, to the new ones."""
        x, window = carry
        new_state = {}
        for i, block in enumerate(self.block):
            name = f"block_{i}"
            old = None if state is None else state[name]
            x, new_state[name], window = block(x, seq, old, window, self.deterministic)
        return (x, window), new_state


def rematerialised(config, index: int = 0):
    """Block that keeps for the backward pass only what `remat` says, if it is among the first `remat_blocks`."""
    if config.remat == "none" or 0 < config.get("remat_blocks", 0) <= index:
        return Block
    if config.remat not in REMAT:
        raise UserError(f"model.remat is {config.remat!r}; allowed: none, {', '.join(REMAT)}")
    return nn.remat(Block, policy=REMAT[config.remat], static_argnums=(5,), prevent_cse=True)


class Backbone(nn.Module):
    """Blocks and the last norm. `config` is config.model."""

    config: FrozenConfigDict

    def setup(self):
        config = self.config
        self.final_norm = RMSNorm(config.norm_eps)
        specs = plan(config)
        unrolled, self.repeats = scanned(config)
        self.block = [rematerialised(config, i)(config, spec) for i, spec in enumerate(specs[:unrolled])]
        self.super_specs = tuple(specs[unrolled : unrolled + (len(specs) - unrolled) // max(self.repeats, 1)])

    def blocks(self, deterministic: bool):
        """The scan over super-blocks, whose parameters are stacked in front; states are stacked behind the batch."""
        scan = nn.scan(
            SuperBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "features": True},
            in_axes=(1, nn.broadcast),
            out_axes=1,
            length=self.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.config, self.super_specs, deterministic, name="blocks")

    @nn.nowrap
    def init_state(self, batch: int, max_length: int = 0):
        """States of the blocks before the first token; see `LanguageModel.init_state`."""
        specs, (unrolled, repeats) = plan(self.config), scanned(self.config)
        layers = {f"block_{i}": block_state(self.config, s, batch, max_length) for i, s in enumerate(specs[:unrolled])}
        if repeats:
            body = specs[unrolled : unrolled + (len(specs) - unrolled) // repeats]
            one = {f"block_{i}": block_state(self.config, s, batch, max_length) for i, s in enumerate(body)}
            layers["blocks"] = jax.tree.map(lambda x: jnp.repeat(x[:, None], repeats, axis=1), one)
        return layers

    @nn.compact
    def __call__(self, x, seq: Sequence, state=None, deterministic: bool = True):
        """x [B, T, D], in the residual dtype, to the hidden states after the last norm [B, T, D] and the new state."""
        old = {} if state is None else state
        layers, window = {}, ()
        for i, block in enumerate(self.block):
            name = f"block_{i}"
            x, layers[name], window = block(x, seq, old.get(name), window, deterministic)
        if self.repeats:
            carry = (x, window)
            (x, _), layers["blocks"] = self.blocks(deterministic)(carry, old.get("blocks"), seq)
        return self.final_norm(x).astype(self.config.dtype), layers
