"""Starts a job of several processes on this host: python -m seqmodels.launch 2 train.py --config=configs/mamba.py

Each is `python train.py --config=... --distributed` with an equal share of the GPUs, as many as CUDA_VISIBLE_DEVICES
names. A signal goes to all. Exit status: 0 all done; 75 where one of them says so; else that of one that failed.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from seqmodels.errors import UserError

TRY_AGAIN = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def environment_of(index: int, count: int, port: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of process `index` of `count`. Raises: UserError where the GPUs cannot be shared out."""
    found = dict(environment) | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    gpus = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip() not in ("", "-1")]
    if len(gpus) % count:
        raise UserError(f"CUDA_VISIBLE_DEVICES={','.join(gpus)}: {len(gpus)} GPUs are no multiple of {count} processes")
    if share := len(gpus) // count:
        found["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(index * share, (index + 1) * share)))
    return found


def run(count: int, arguments: Sequence[str]) -> int:
    """Starts the processes, waits for all, and returns the exit status."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environments = [environment_of(index, count, port, os.environ) for index in range(count)]
    command = [sys.executable, *arguments, "--distributed"]
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes before all are there waits for them
    for environment in environments:
        # the locks that this process was given are theirs too
        processes.append(subprocess.Popen(command, env=environment, close_fds=False, preexec_fn=_begin))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return status_of([process.wait() for process in processes])


def status_of(statuses: Sequence[int]) -> int:
    """One exit status for the job, from those of its processes; negative ones are of signals."""
    if not any(statuses):
        return 0
    return TRY_AGAIN if TRY_AGAIN in statuses else next(128 - code if code < 0 else code for code in statuses if code)


def _begin() -> None:
    """In each process, before its program: hear signals, and die with the parent."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    try:
        if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
            raise UserError("give a number of processes and a script: python -m seqmodels.launch 2 train.py ...")
        return run(int(arguments[0]), arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
