"""The stack of blocks that a layer pattern describes, between a model's input and its head.

seqmodels/pattern.py defines the pattern language. The carry of a connection across depth (seqmodels/depth) is passed
from block to block beside the residual stream.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from seqmodels import depth
from seqmodels.branch import Branch, State, grows
from seqmodels.branches import BRANCHES
from seqmodels.fields import refuse
from seqmodels.layers.gathered import NAME, splits_matrices
from seqmodels.layers.norm import norm_of
from seqmodels.mixers.bidirectional import Bidirectional
from seqmodels.mixers.short_conv import ShortConv
from seqmodels.nearest import nearest
from seqmodels.pattern import BOTH_WAYS, Step, name_of, names, parse
from seqmodels.sequence import Sequence

REMAT = {  # the activations of a block that are saved for the backward pass; the others are recomputed
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mixer": jax.checkpoint_policies.save_only_these_names("projected", "stream"),  # recomputes norms, the scan
    "projected": jax.checkpoint_policies.save_only_these_names("projected"),  # recomputes norms, convolutions, the scan
    "rescan": jax.checkpoint_policies.save_only_these_names(  # recomputes the scan over time, casts, gates
        "normed", "projected", "stream", "readout", "statistics"
    ),
    "scan": jax.checkpoint_policies.save_only_these_names("scan"),  # recomputes all but the scan over time
    "streams": jax.checkpoint_policies.save_only_these_names("stream"),
}
ALL_OWN = jax.checkpoint_policies.save_anything_except_these_names(NAME)  # but what other devices hold


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One block of the stack.

    Attributes:
        steps: run one after the other. Each step is the words of its parallel branches, such as (("mamba",), ("mlp",)).
        sources: for DenseSSM: how many hidden streams below the block it reads.
    """

    steps: tuple[Step, ...]
    sources: int = 0

    def names(self) -> dict[str, str]:
        """Place of each branch in the tree of parameters, and its word: {"mixer": "mamba", "mlp": "mlp"}.

        The names of the first two steps date from the time when every block was a mixer and an MLP.
        """
        return {
            step_name(i) + (f"_{j}" if j else ""): word
            for i, step in enumerate(self.steps)
            for j, word in enumerate(step)
        }


def step_name(step: int) -> str:
    """Name of the first branch of a step."""
    return ("mixer", "mlp")[step] if step < 2 else f"branch_{step}"


def norm_name(step: int) -> str:
    """Name of the norm before a step."""
    return ("norm", "mlp_norm")[step] if step < 2 else f"norm_{step}"


def norms_of(step: int, branches: int, own: bool) -> list[str]:
    """Names of the norms of a step's branches: `own` for each, or the same for all."""
    first = norm_name(step)
    return [first] + [f"{step_name(step)}_{j}_norm" if own else first for j in range(1, branches)]


def norms_behind(config: Any, spec: BlockSpec) -> bool:
    """Whether the block's norms are behind its branches: one of them is named in `config.norms_behind`."""
    chosen = config.norms_behind.split()
    return any(name_of(word) in chosen for word in spec.names().values())


def linked(spec: BlockSpec) -> list[str]:
    """Words of the block's branches whose hidden state DenseSSM can access."""
    words = spec.names().values()
    return [word for word in words if not word.startswith(BOTH_WAYS) and BRANCHES[word].link]


def plan(config: Any) -> list[BlockSpec]:
    """Every block from bottom to top; `config` is config.model. DenseSSM counts only blocks with a hidden stream.

    Raises UserError for a pattern that is wrong, or that does not fit the dense links.
    """
    blocks = [BlockSpec(block) for block in parse(config.pattern)] * config.repeats
    depth.check(config, {word for block in blocks[: len(blocks) // config.repeats] for word in block.names().values()})
    dense = config.dense
    if dense.variant == "none":
        return blocks
    words = [linked(block) for block in blocks]
    kinds = sorted({word for found in words for word in found})
    if not kinds:
        able = ", ".join(name for name in BRANCHES if BRANCHES[name].link)
        refuse("model.dense.variant", dense.variant, f"'none' without one of {able} in model.pattern")
    if len(kinds) > 1 or any(len(found) > 1 for found in words):
        allowed = f"'none', or model.pattern have one branch a block, of one kind, with a hidden state; not {kinds}"
        refuse("model.dense.variant", dense.variant, allowed)
    depth.check_links(config, kinds[0])
    specs, streams = [], 0
    for block, found in zip(blocks, words, strict=True):
        sources = min(dense.depth, streams) if found and streams % dense.every == 0 else 0
        streams += bool(found)
        specs.append(BlockSpec(block.steps, sources))
    return specs


def scanned(config: Any) -> tuple[int, int]:
    """Blocks at the bottom that are unrolled, and the number of super-blocks above them that are scanned over.

    Unrolled are the first super-blocks that do not yet have m streams below them.
    """
    blocks = plan(config)
    if not config.scan_blocks:
        return len(blocks), 0
    if config.remat_blocks:
        refuse("model.remat_blocks", config.remat_blocks, f"0 with model.scan_blocks={config.scan_blocks}")
    if config.repeats % config.scan_blocks:
        refuse("model.scan_blocks", config.scan_blocks, f"0, or a divisor of model.repeats={config.repeats}")
    size = len(parse(config.pattern)) * config.scan_blocks
    groups = [blocks[i : i + size] for i in range(0, len(blocks), size)]
    first = min(depth.growing(config), len(groups))
    while first < len(groups) and groups[first] != groups[-1]:
        first += 1
    if any(group != groups[-1] for group in groups[first:]):
        refuse(
            "model.dense.every", config.dense.every, f"a divisor of the {size} blocks that model.scan_blocks makes one"
        )
    needed = 0 if config.dense.variant == "none" else config.dense.depth
    while first < len(groups) and sum(bool(linked(spec)) for spec in blocks[: first * size]) < needed:
        first += 1
    return first * size, len(groups) - first


def conv_name(name: str) -> str:
    """Name of the short convolution before a branch."""
    return f"{name}_conv"


def convolutions(config: Any, spec: BlockSpec) -> dict[str, str]:
    """Place of each short convolution of the block (`config.short_conv`), and the word of the mixer behind it."""
    if not config.short_conv:
        return {}
    return {conv_name(name): word for name, word in spec.names().items() if BRANCHES[name_of(word)].mixes_time}


def branch_of(config: Any, word: str, layer: int | None = None, **parent: Any) -> Branch:
    """The branch of a word of the pattern in the block `layer`. Its own fields come from config.model.<name>."""
    name = name_of(word)
    kind, options = BRANCHES[name], dict(config.get(name, {}))
    for option in options:
        if option not in kind.__dataclass_fields__:
            known = [field for field in kind.__dataclass_fields__ if field not in Branch.__dataclass_fields__]
            refuse(
                f"model.{name}.{option}", options[option], f"left out: {name} has no such field{nearest(option, known)}"
            )
    return _in_directions(config, word, kind, options | dict(layer=layer), parent)


def conv_of(config: Any, word: str, **parent: Any) -> Branch:
    """The short convolution before the mixer that is a word of the pattern; in both directions where the mixer is."""
    return _in_directions(config, word, ShortConv, dict(taps=config.short_conv), parent)


def _in_directions(config: Any, word: str, kind: type[Branch], options: dict, parent: dict) -> Branch:
    """A branch of this class with the model's fields, in the direction, or both, that the word says."""
    dtype = jnp.dtype(config.dtype)
    common = dict(
        width=config.width,
        layers=config.repeats * len(parse(config.pattern)),
        dtype=dtype,
        implementation=dict(config.implementation),
        bias=config.bias and kind.biased,
    )
    if not word.startswith(BOTH_WAYS):
        return kind(**common, **options, **parent)
    ahead, back = (kind(**common, **options, parent=None) for _ in range(2))
    return Bidirectional(config.width, dtype, ahead=ahead, back=back, **parent)


def connection_of(config: Any, spec: BlockSpec, **parent: Any) -> depth.Connection:
    """The block's connection across depth."""
    branches = [branch_of(config, word, parent=None) for word in spec.names().values()]
    return depth.connection_of(config, branches, len(spec.steps), spec.sources, **parent)


def block_state(config: Any, spec: BlockSpec, batch: int, max_length: int | None) -> dict[str, State]:
    """A block's state before the first token, by branch. Branches without a state are left out. Needs no parameters."""
    states = {
        name: branch_of(config, word, parent=None).init_state(batch, max_length) for name, word in spec.names().items()
    }
    for name, word in convolutions(config, spec).items():
        states[name] = conv_of(config, word, parent=None).init_state(batch)
    states[depth.kind(config)] = connection_of(config, spec, parent=None).init_state(batch)
    return with_leaves(states)


def with_leaves(states: dict[str, State]) -> dict[str, State]:
    """The states that contain arrays."""
    return {name: state for name, state in states.items() if jax.tree.leaves(state)}


class Block(nn.Module):
    """For each step x + branches(norm(x)), with the connection across depth around and between them.

    With `config.norms_behind` x + norm(branches(x)).
    `layer` is the block's number in the stack; None inside a scan over layers, which computes many with one program.
    """

    config: FrozenConfigDict
    spec: BlockSpec
    layer: int | None = None

    def setup(self) -> None:
        config, spec = self.config, self.spec
        setattr(self, depth.kind(config), connection_of(config, spec))
        self.dropout = nn.Dropout(config.dropout)
        for i, step in enumerate(spec.steps):
            for name in dict.fromkeys(norms_of(i, len(step), config.parallel_norms)):
                setattr(self, name, norm_of(config))
        for name, word in spec.names().items():
            setattr(self, name, branch_of(config, word, self.layer))
        for name, word in convolutions(config, spec).items():
            setattr(self, name, conv_of(config, word))

    def __call__(
        self, x: jax.Array, seq: Sequence, state: dict[str, State] | None, carry: depth.Carry, deterministic: bool
    ) -> tuple[jax.Array, dict[str, State], depth.Carry]:
        """Maps x [B, T, D], state and carry to their new values."""
        dtype, kind = jnp.dtype(self.config.dtype), depth.kind(self.config)
        connection: depth.Connection = getattr(self, kind)
        old = state or {}
        own, new = old.get(kind, {}), {}
        names, convolved = iter(self.spec.names()), convolutions(self.config, self.spec)
        behind = norms_behind(self.config, self.spec)
        for i, step in enumerate(self.spec.steps):
            u, carry = connection.enter(x, carry, i)
            norms = norms_of(i, len(step), self.config.parallel_norms)
            before = {norm: (lambda u: u) if behind else getattr(self, norm) for norm in norms}
            normed = {norm: before[norm](u).astype(dtype) for norm in before}
            if i == 0:  # model.remat knows it by this name
                normed = {norm: checkpoint_name(y, "normed") for norm, y in normed.items()}
            ys = []
            for norm, name in zip(norms, names, strict=False):  # the other names are of later steps
                branch, u, conv = getattr(self, name), normed[norm], conv_name(name)
                if conv in convolved:
                    y, new[conv] = getattr(self, conv)(u, seq, old.get(conv))
                    u = u + y
                y, new[name], carry, own = connection.run(branch, u, seq, old.get(name), carry, own)
                y = getattr(self, norm)(y) if behind else y
                ys.append(self.dropout(y, deterministic=deterministic))
            x, carry = connection.leave(x, sum(ys[1:], start=ys[0]), carry, i)
        new[kind] = own
        return nn.with_logical_constraint(x, ("batch", "length", None)), with_leaves(new), carry


class SuperBlock(nn.Module):
    """Several blocks, the body of the scan over layers."""

    config: FrozenConfigDict
    specs: tuple[BlockSpec, ...]
    deterministic: bool

    def setup(self) -> None:
        self.block = [rematerialised(self.config)(self.config, spec) for spec in self.specs]

    def __call__(self, carry: tuple[jax.Array, Any], state: Any, seq: Sequence) -> tuple[tuple[jax.Array, Any], Any]:
        """Maps carry (x, carry of the connection across depth) and this super-block's states to their new values."""
        x, below = carry
        new_state = {}
        for i, block in enumerate(self.block):
            name = f"block_{i}"
            old = None if state is None else state.get(name)
            x, new_state[name], below = block(x, seq, old, below, self.deterministic)
        return (x, below), new_state


def rematerialised(config: Any, index: int = 0) -> Callable[..., Block]:
    """Block class. If `index` is among the first `remat_blocks`, the block saves only what `remat` names.

    Other blocks save all but the matrices that they gathered.
    """
    policy = ALL_OWN if config.remat == "none" or 0 < config.remat_blocks <= index else REMAT[config.remat]
    if policy is ALL_OWN and not splits_matrices():
        return Block
    return nn.remat(Block, policy=policy, static_argnums=(5,), prevent_cse=True)


def causal(config: Any) -> bool:
    """Whether no hidden state depends on a later token; `config` is config.model."""
    words = (word for block in parse(config.pattern) for step in block for word in step)
    return all(not word.startswith(BOTH_WAYS) and BRANCHES[word].causal for word in words)


def redraw_every(config: Any) -> int:
    """Training steps after which the random stream "features" changes; 0: there is none. `config` is config.model."""
    branches = (branch_of(config, name, parent=None) for name in names(config.pattern))
    return max(branch.redraw_every for branch in branches)


def draws_by_row(config: Any) -> bool:
    """Whether a training step draws random numbers for each row, of the stream "dropout". `config` is config.model."""
    branches = (branch_of(config, name, parent=None) for name in names(config.pattern))
    return config.dropout > 0 or any(branch.draws_by_row for branch in branches)


def context(config: Any) -> int | None:
    """Number of tokens that the model can see: `seq_len` if a state is a cache, or positions are learned; else None.

    `config` is the config of the whole run.
    """
    branches = (branch_of(config.model, name, parent=None) for name in names(config.model.pattern))
    growing = any(grows(branch, config.seq_len) for branch in branches)
    return config.seq_len if growing or config.model.positions == "learned" else None


class Backbone(nn.Module):
    """Blocks and the last norm. `config` is config.model."""

    config: FrozenConfigDict

    def setup(self) -> None:
        config = self.config
        self.final_norm = norm_of(config)
        setattr(self, depth.kind(config), depth.connection_of(config, [], 0))
        specs = plan(config)
        unrolled, self.repeats = scanned(config)
        self.block = [rematerialised(config, i)(config, spec, i) for i, spec in enumerate(specs[:unrolled])]
        self.super_specs = tuple(specs[unrolled : unrolled + (len(specs) - unrolled) // max(self.repeats, 1)])

    def blocks(self, deterministic: bool) -> nn.Module:
        """The scan over super-blocks. Their parameters are stacked on the first axis, their states after the batch."""
        scan = nn.scan(
            SuperBlock,
            variable_axes={"params": 0, "losses": 0, "figures": 0, "running": 0, "routing": 0},
            split_rngs={"params": True, "dropout": True, "features": True},
            in_axes=(1, nn.broadcast),
            out_axes=1,
            length=self.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.config, self.super_specs, deterministic, name="blocks")

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, Any]:
        """States of the blocks before the first token; see `LanguageModel.init_state`."""
        specs, (unrolled, repeats) = plan(self.config), scanned(self.config)
        layers = {f"block_{i}": block_state(self.config, s, batch, max_length) for i, s in enumerate(specs[:unrolled])}
        if repeats:
            body = specs[unrolled : unrolled + (len(specs) - unrolled) // repeats]
            one = {f"block_{i}": block_state(self.config, s, batch, max_length) for i, s in enumerate(body)}
            layers["blocks"] = jax.tree.map(lambda x: jnp.repeat(x[:, None], repeats, axis=1), one)
        return layers

    @nn.compact
    def __call__(
        self, x: jax.Array, seq: Sequence, state: Any = None, deterministic: bool = True
    ) -> tuple[jax.Array, dict[str, Any]]:
        """x [B, T, D], in the residual dtype, to the hidden states after the last norm [B, T, D] and the new state."""
        old = {} if state is None else state
        layers = {}
        end: depth.Connection = getattr(self, depth.kind(self.config))
        carry = end.start(x, [getattr(block, depth.kind(self.config)) for block in self.block])
        for i, block in enumerate(self.block):
            name = f"block_{i}"
            x, layers[name], carry = block(x, seq, old.get(name), carry, deterministic)
        if self.repeats:
            (x, carry), layers["blocks"] = self.blocks(deterministic)((x, carry), old.get("blocks"), seq)
        return self.final_norm(end.finish(x, carry)).astype(self.config.dtype), layers
