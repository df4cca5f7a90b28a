"""The engine that submits trials to Slurm as one array of jobs, with submitit (pip install submitit)."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from seqmodels.errors import UserError
from seqmodels.sweeps.attempt import Stop
from seqmodels.sweeps.devices import Slot
from seqmodels.sweeps.local import Workers
from seqmodels.sweeps.trial import FINAL, Trial

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

POLL = 2.0  # seconds between looks at the records
FOLDER = Path(__file__).resolve().parents[2]  # that `import seqmodels` finds it in, on the other host too


# Slurm's warning goes to every process of a task. It is for the task, which tells the trial.
SLOT = Slot(prefix=("sh", "-c", "trap '' USR2; exec \"$@\"", "sh"))
DEFAULTS = {"timeout_min": 240}


@dataclasses.dataclass
class Job:
    """A task of the array: runs one trial, unless another process has claimed or finished it.

    Before its time limit, or when it is preempted, Slurm sends it a signal. Then the trial saves a checkpoint, and the
    task goes back into the queue.
    """

    trial: Trial
    again: bool

    def __call__(self) -> str:
        self.workers = Workers([self.trial], [SLOT], again=self.again, wait=False)
        self.workers.run()
        return self.trial.record()["status"]

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit on that signal, while `__call__` runs. Returns the job to put back into the queue."""
        from submitit.helpers import DelayedSubmission

        self.workers.stop()
        self.workers.join()
        return DelayedSubmission(Job(self.trial, self.again))


def run(
    trials: list[Trial],
    folder: Path,
    options: dict[str, object],
    *,
    parallel: int,
    again: bool,
    show: Callable[[], None],
    stop: Stop,
) -> None:
    """Submits the trials that are left, and waits until they have ended. On `stop` the jobs stay in the queue.

    Args:
      options: arguments of submitit's AutoExecutor.update_parameters, such as slurm_partition and timeout_min.
      parallel: tasks at once; 0: as many as Slurm starts.

    Raises: UserError where submitit or Slurm is missing, or an option is not one.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--engine=slurm: needs submitit: pip install submitit") from None
    left = [trial for trial in trials if trial.record()["status"] not in (("done",) if again else FINAL)]
    try:
        # Tasks go on where they are, so they may time out as often as it takes.
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster="slurm", slurm_max_num_timeout=1000)
        options = {"name": folder.name, "slurm_array_parallelism": parallel or max(len(left), 1)} | DEFAULTS | options
        executor.update_parameters(**options)
    except RuntimeError as error:
        raise UserError(f"--engine=slurm: {error}") from None
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--slurm: {error}") from None
    if not left:
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    try:
        with executor.batch():
            jobs = [executor.submit(Job(trial, again)) for trial in left]
    except submitit.core.utils.FailedJobError as error:  # sbatch refused
        raise UserError(f"--engine=slurm: {error}") from None
    print(f"submitted {len(jobs)} tasks, {jobs[0].job_id} to {jobs[-1].job_id}; Ctrl-C leaves them in the queue")
    while not stop.asked.is_set() and not all(job.done() for job in jobs):
        show()
        stop.asked.wait(POLL)
    show()
