"""What a trial runs on: one GPU, several as its mesh asks, a part of a GPU, or a part of the CPU's cores."""

import contextlib
import dataclasses
import getpass
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from seqmodels.claim import Claim
from seqmodels.errors import UserError

PARTS = 8  # of a GPU that are claimed, each with a lock: a trial that has the GPU alone claims all
MEMORY = 0.92  # of a GPU's, that trials may share


@dataclasses.dataclass(frozen=True)
class Slot:
    """The devices of one trial. Environment and CPU affinity select them before the trial imports JAX.

    Attributes:
      environment: variables of the trial's processes.
      cores: CPU cores that the trial may use; None: all.
      prefix: words that are put before each command of the trial.
      locks: lock files, PARTS for each device, so that two sweeps of a user on this host never take the same part.
      sharing: how many trials share its device.
    """

    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: frozenset[int] | None = None
    prefix: tuple[str, ...] = ()
    locks: tuple[Path, ...] = ()
    sharing: int = 1

    @contextlib.contextmanager
    def claimed(self) -> Iterator[list[int] | None]:
        """Holds the devices and yields the descriptors of their locks; None if another sweep holds one of them."""
        claims = []
        try:
            for lock in self.locks:
                claim = Claim.take(lock)
                if claim is None:
                    break
                claims.append(claim)
            yield [claim.descriptor for claim in claims] if len(claims) == len(self.locks) else None
        finally:
            for claim in claims:
                claim.release()


def slots(parallel: int, config: ConfigDict, per_gpu: int = 1) -> list[Slot]:
    """Slots for `parallel` trials at once; 0: `per_gpu` for each GPU, or one on a CPU.

    Trials that share a GPU get equal parts of its memory. The first slots are on different GPUs.

    Raises: UserError if this host has too few GPUs, or if trials that need several GPUs are asked to share them.
    """
    found = [] if config.platform == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu" else gpus()
    if found:
        size = math.prod(max(n, 1) for n in config.mesh.values())
        if size > len(found):
            raise UserError(f"config.mesh asks for {size} GPUs; this host has {len(found)}")
        if size > 1 and per_gpu > 1:
            raise UserError(f"--per_gpu={per_gpu}: must be 1 where config.mesh asks for {size} GPUs a trial")
        room = len(found) // size
        count = parallel or room * per_gpu
        if count > room * per_gpu:
            each = f" of {size} GPUs each" if size > 1 else ""
            need = -(-count // per_gpu) * size
            raise UserError(f"--parallel={parallel}: trials{each} need {need} GPUs; this host has {len(found)}")
        return [_gpu_slot(found[i % room * size : (i % room + 1) * size], i // room, per_gpu) for i in range(count)]
    if not hasattr(os, "sched_getaffinity") or parallel <= 1:
        return [Slot() for _ in range(parallel or 1)]
    cores = sorted(os.sched_getaffinity(0))
    return [Slot(cores=frozenset(cores[i % len(cores) :: parallel])) for i in range(parallel)]


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.split()


def _gpu_slot(names: list[str], share: int, sharing: int) -> Slot:
    """The `share`-th of `sharing` equal parts of some GPUs."""

    def lock(name, part):
        file = f"seqmodels-{getpass.getuser()}-gpu-{name}-{part}.lock"
        return Path(tempfile.gettempdir()) / re.sub(r"[^\w.-]", "_", file)

    parts = range(share * PARTS // sharing, (share + 1) * PARTS // sharing)
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    if sharing > 1:  # JAX has two names for it, and only one may be set
        old, new = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
        environment[old if old in os.environ else new] = f"{MEMORY / sharing:.3f}"
    return Slot(environment, locks=tuple(lock(name, part) for name in names for part in parts), sharing=sharing)
