"""The cluster that a job of several processes runs on: who the other processes are, and which devices are this one's.

JAX finds them under Slurm, Open MPI, Kubernetes (JobSet, GKE) and on TPU pods. By hand JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
"""

import ctypes
import hashlib
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqmodels.errors import UserError
from seqmodels.job import TRY_AGAIN

BY_HAND = "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"


def connect() -> None:
    """Makes this process one of a job, before the first JAX computation.

    Raises: UserError where nobody says who the others are, or they cannot be reached.
    """
    import jax

    numbers = numbers_of(os.environ)
    if (devices := slurm_devices(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))) is not None:
        numbers["local_device_ids"] = devices
    # SIGTERM is the job's own matter, as Ctrl-C is: in the steps, in the evaluation at the end, and before both.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**numbers)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        text = " ".join(str(error).split())
        if "should be defined" in text or "must be defined" in text:
            raise UserError(
                f"--distributed: no Slurm step (srun), Open MPI, Kubernetes job or TPU pod is found here; set {BY_HAND}"
            ) from error
        raise UserError(f"--distributed: the processes did not come together: {text[:300]}") from error
    _end_without_first()


def numbers_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` that the environment gives by hand. Raises: UserError."""
    numbers: dict[str, Any] = {}
    for name in ("num_processes", "process_id"):
        if value := environment.get(f"JAX_{name.upper()}"):
            if not value.isdecimal():
                raise UserError(f"JAX_{name.upper()}={value}: must be a number")
            numbers[name] = int(value)
    address = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if address and not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT of process 0")
    if len(numbers) == 2 and numbers["process_id"] >= numbers["num_processes"]:
        raise UserError(
            f"JAX_PROCESS_ID={numbers['process_id']}: must be less than JAX_NUM_PROCESSES={numbers['num_processes']}"
        )
    return numbers


def slurm_devices(environment: Mapping[str, str], present: int) -> list[int] | None:
    """The GPUs of this task of a Slurm step, by number; None: what JAX assumes, which is one task for each GPU.

    Args:
      present: GPUs of the host, which count where Slurm does not restrict a task to some.

    Raises: UserError where some GPUs of the host would be idle.
    """
    if "SLURM_PROCID" not in environment or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len([name for name in named.split(",") if name]) if named is not None else present
    layout = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    tasks = max(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", layout)), default=1)
    if gpus == 0 or (gpus == tasks and named is None):
        return None
    if gpus == 1 or tasks == 1:  # each task sees its own GPU only, or has all of the host
        return list(range(gpus))
    if gpus == tasks:
        return None
    raise UserError(
        f"--distributed: Slurm runs {tasks} tasks on a host with {gpus} GPUs, of which each task would use one; start "
        f"one task a GPU (srun --ntasks-per-node={gpus}) or one a host, or set JAX_LOCAL_DEVICE_IDS"
    )


def versions() -> dict[str, str]:
    """What the processes of a job must have in common for their programs to be one: versions, the code, XLA's flags."""
    import jax
    import jaxlib

    folder = Path(__file__).parent
    code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "the code of seqmodels": code.hexdigest()[:12],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


_handler: Any = None  # of SIGABRT: C calls it, so it must live as long as the process


def _end_without_first() -> None:
    """Where the first process is gone, this one says so and can be started again.

    JAX's client then aborts the process from its own thread, and has no other way to be told (jax 0.10, 0.11).
    """
    from jax._src import distributed as state

    if state.global_state.process_id == 0:
        return
    host, _, port = (state.global_state.coordinator_address or "").rpartition(":")

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def ended(_: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            line = f"gone: the first process of the job, on {host}; the same command goes on from the last checkpoint\n"
            os.write(2, line.encode())
            os._exit(TRY_AGAIN)
        # else another abort, which goes on when this function returns

    global _handler
    _handler = ended
    ctypes.CDLL(None).signal(signal.SIGABRT, ended)
