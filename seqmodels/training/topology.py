"""Chips that a plan may be for, and topologies of them that need not be here.

`v5p:8x8x4` are the TPUs of a slice in its torus, `h100:64` so many GPUs in hosts of eight. Programs are compiled for
them ahead of time: for TPUs by libtpu, for GPUs by JAX's CUDA plug-in. Where that is missing, CPU devices stand for
them, as many as there are chips.
"""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from seqmodels.errors import UserError

HOST = 8  # GPUs of one host, which NVLink connects


class Chip(NamedTuple):
    """A kind of chip. Published figures; see SOURCES.

    Attributes:
        flops: dense bfloat16 operations a second. memory: bytes.
        link: bytes a second that a chip receives along one axis of a TPU's torus, or by NVLink.
        network: bytes a second that a GPU receives from other hosts; 0: a torus has none.
        axes: of the torus; 0: there is none.
    """

    flops: float
    memory: float
    link: float
    network: float = 0
    axes: int = 0


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 9e10, axes=2),
    "v5p": Chip(459e12, 95 * 2**30, 1.8e11, axes=3),
    "v6e": Chip(918e12, 32 * 2**30, 1.8e11, axes=2),
    "h100": Chip(989e12, 80e9, 4.5e11, network=5e10),
    "h200": Chip(989e12, 141e9, 4.5e11, network=5e10),
}
SOURCES = (
    "TPUs: operations and memory of cloud.google.com/tpu/docs, links of the scaling book's chapter on TPUs (both "
    "directions of an axis); GPUs: NVIDIA's data sheets, NVLink 4 in one direction, one 400 Gbit/s adapter a GPU"
)


class Topology(NamedTuple):
    """Attributes: name: as it was asked for. chip: key of CHIPS. shape: of the torus, or of (hosts, GPUs of a host)."""

    name: str
    chip: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def bandwidth(self, devices: list[int]) -> float:
        """Bytes a second that each of these devices can receive from the others, if all exchange at once.

        TPUs: by every axis of the torus along which they differ. GPUs of one host: by NVLink; else by the network.
        """
        chip = CHIPS[self.chip]
        places = np.stack(np.unravel_index(devices, self.shape), 1)
        differ = (places != places[0]).any(0)
        if chip.axes:
            return chip.link * max(int(differ.sum()), 1)
        return chip.network if differ[0] else chip.link


def parse(text: str) -> Topology:
    """`v5p:8x8x4` or `h100:64`. Raises: UserError."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    chips = ", ".join(CHIPS)
    if not match or match[1] not in CHIPS or 0 in map(int, match[2].split("x")):
        raise UserError(f"--topology={text}: must be such as v5p:8x8x4 or h100:64; there are {chips}")
    name, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    axes = CHIPS[name].axes
    if axes and len(shape) != axes:
        raise UserError(f"--topology={text}: the torus of {name} has {axes} axes, such as {'8x8x4'[: 2 * axes - 1]}")
    if not axes:
        if len(shape) > 1 or (shape[0] > HOST and shape[0] % HOST):
            raise UserError(f"--topology={text}: must be a number of GPUs, such as {name}:64, in hosts of {HOST}")
        shape = max(shape[0] // HOST, 1), min(shape[0], HOST)
    return Topology(text, name, shape)


def prepare(topology: Topology) -> None:
    """Sets what JAX's libraries read when they are loaded: before the first computation."""
    if CHIPS[topology.chip].axes:
        names = ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("TPU_WORKER_ID", "0")
        more = ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_LOG_DIR", "disabled")
        for name, value in (*names, *more):
            os.environ.setdefault(name, value)
    if not compiler(topology):
        jax.config.update("jax_num_cpu_devices", topology.size)


def compiler(topology: Topology) -> str:
    """What compiles for this chip here; "" if nothing does."""
    wanted = "libtpu" if CHIPS[topology.chip].axes else "jax_cuda13_plugin"
    return wanted if importlib.util.find_spec(wanted) else ""


def devices(topology: Topology) -> list[jax.Device]:
    """The chips, in the order of their places; CPU devices where nothing here compiles for them.

    Raises: UserError for a topology that the compiler does not know.
    """
    if not compiler(topology):
        return jax.devices("cpu")[: topology.size]
    try:
        return list(_description(topology).devices)
    except Exception as error:  # the libraries raise many sorts
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology={topology.name}: {compiler(topology)} does not know it ({reason})") from error


def _description(topology: Topology):
    if CHIPS[topology.chip].axes:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    target = (Path(__file__).parent / "h100.pbtxt").read_text()
    hosts, each = topology.shape
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{hosts}x{each}")
