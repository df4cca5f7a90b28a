"""What a training step will need on chips that need not be here: the real step, compiled ahead of time.

Memory, operations and collectives are the compiled program's. Times are not: they are bytes over published bandwidths
and operations over a share of the published peak, which says how fast a step can be and not how fast it will be.
"""

import math
from collections import defaultdict
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from seqmodels import data
from seqmodels.config import upgrade, validate
from seqmodels.errors import UserError
from seqmodels.model import build_for
from seqmodels.training import flops, sharding
from seqmodels.training.collectives import Collective, by_axis, collectives
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state
from seqmodels.training.step import lower_train_step, make_train_step
from seqmodels.training.topology import CHIPS, SOURCES, Topology, compiler, devices

# The share of the peak that one chip reaches by itself: Mamba 370M on one H200 (benchmarks/results).
REACHED = 0.29
UNKNOWN = (
    "time of kernels and of memory traffic, latency of collectives, how much of them compute hides, the input "
    "pipeline, checkpoints, failures, and anything between slices of TPUs"
)


def fitted(config: ConfigDict, topology: Topology) -> ConfigDict:
    """The config with mesh.data filled in. Raises: UserError where the mesh does not take all chips."""
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    if sizes["data"] == -1 and topology.size % others == 0:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.mesh.data = topology.size // others
        return config.lock()
    if sizes["data"] * others != topology.size:
        shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise UserError(
            f"--topology={topology.name}: has {topology.size} chips, and config.mesh ({shape or 'data=1'}) does not "
            "take them all; set mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence so that their product is that"
        )
    return config


def foresee(config: ConfigDict, topology: Topology) -> dict:
    """The figures of a step on a topology, for JSON; `config` is `fitted`.

    Returns:
        chips, compiled_by ("" for CPU devices that stand for the chips). peak_bytes: memory of a chip at the peak,
        its state included; memory_bytes: what it has. flops: of the model on a chip in a step. collectives: by axes
        and kind, how often and how many bytes a chip receives. compute_seconds, exchange_seconds: at REACHED of the
        peak, and at the published bandwidths. step_seconds and mfu: [with nothing hidden, with all hidden that can
        be]. scaling: the share of the ideal that follows.
    """
    validate(config)
    config = upgrade(config).lock()
    mesh = sharding.make_mesh(config, devices(topology))
    sizes = dict(seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
    dataset = data.load_unread(config.data, **sizes)
    model = build_for(config.model, dataset)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    abstract = abstract_state(model, optimizer, config, mesh, boxed)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
        lowered = lower_train_step(step, abstract, config, mesh, dataset.spec)
        quick: dict[str, Any] = {} if compiler(topology) else {"xla_backend_optimization_level": 0}
        compiled = lowered.compile(compiler_options=quick or None)
    found = collectives(compiled.as_text() or "", mesh)
    operations = flops.train_step_flops(boxed, config) / topology.size
    return _figures(topology, found, operations, _peak(compiled.memory_analysis())) | {"mesh": dict(mesh.shape)}


def _peak(memory: Any) -> int:
    """Bytes of a device at the peak: arguments, results that are not arguments, and temporaries."""
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + own + memory.temp_size_in_bytes


def _figures(topology: Topology, found: list[Collective], operations: float, peak: int) -> dict:
    chip = CHIPS[topology.chip]
    seconds = defaultdict[str, float](float)
    for each in found:
        seconds[each.axes] += each.moved / topology.bandwidth(list(each.devices))
    compute, exchange = operations / (REACHED * chip.flops), sum(seconds.values())
    step = compute + exchange, max(compute, exchange)
    return dict(
        topology=topology.name,
        chips=topology.size,
        compiled_by=compiler(topology),
        peak_bytes=peak,
        memory_bytes=round(chip.memory),
        flops=round(operations),
        collectives=by_axis(found),
        exchange_seconds_by_axes=dict(seconds),
        compute_seconds=compute,
        exchange_seconds=exchange,
        step_seconds=list(step),
        mfu=[operations / chip.flops / time for time in step],
        scaling=[compute / time for time in step],
    )


def text(figures: dict, tokens: int) -> str:
    """The figures as lines; tokens: of a step."""
    by = figures["compiled_by"]
    how = f"compiled by {by}" if by else (
        "no compiler for these chips is installed: partitioned for CPU devices, whose compiler sends 16-bit numbers as "
        "32 bits and needs other memory"
    )  # fmt: skip
    share = 100 * figures["peak_bytes"] / figures["memory_bytes"]
    lines = [
        f"topology    {figures['topology']}: {figures['chips']} chips; {how}",
        f"memory      {figures['peak_bytes'] / 2**30:,.2f} GiB a chip at the peak, {share:.0f} % of what it has",
        f"compute     {figures['flops']:.4g} operations a chip and step: {1e3 * figures['compute_seconds']:,.1f} ms at "
        f"{100 * REACHED:.0f} % of the peak, which one chip reaches with Mamba 370M",
    ]
    for axes, kinds in figures["collectives"].items():
        parts = [f"{count} {kind} {moved / 1e6:,.1f} MB" for kind, (count, moved) in kinds.items()]
        time = 1e3 * figures["exchange_seconds_by_axes"][axes]
        lines.append(f"exchange    {axes}: {', '.join(parts)}; {time:,.1f} ms")
    slow, fast = figures["step_seconds"]
    lines += [
        f"estimate    {1e3 * fast:,.1f} to {1e3 * slow:,.1f} ms a step ({tokens / slow:,.0f} to {tokens / fast:,.0f} "
        f"tokens/s), MFU {100 * figures['mfu'][0]:.1f} to {100 * figures['mfu'][1]:.1f} %, "
        f"{100 * figures['scaling'][0]:.0f} to {100 * figures['scaling'][1]:.0f} % of the ideal: no exchange hidden, "
        "and all",
        f"not known   {UNKNOWN}",
        f"sources     {SOURCES}",
    ]
    return "\n".join(lines)
