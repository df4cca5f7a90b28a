"""EleutherAI's lm-evaluation-harness (lm-eval) in this process, on the tasks that `config.evaluation.tasks` names."""

import contextlib
import difflib
import functools
import importlib.util
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ml_collections import ConfigDict

from seqmodels.backbone import context
from seqmodels.errors import UserError
from seqmodels.evals import memory
from seqmodels.evals.lists import LISTS, WITHOUT_FILE, parse
from seqmodels.evals.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from seqmodels.evals.harness_model import HarnessModel

FOLDER = Path(__file__).with_name("tasks")
RESAMPLES = 1000  # of the bootstrap, for the standard errors that have no formula


def prepare() -> None:
    """Sets what lm-eval reads when it is imported. Raises: UserError where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--evals=lm_eval: lm-eval is not installed; pip install -r requirements-eval.txt")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no bootstrap in forks of a process with threads
    if "HF_HUB_OFFLINE" not in os.environ and not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        os.environ["HF_HUB_OFFLINE"] = "1"  # what is not in the cache fails at once, and not after retries


def _reachable(address: str) -> bool:
    try:
        socket.getaddrinfo(urlparse(address).hostname, 443)
    except OSError:
        return False
    return True


class Tasks:
    """The tasks that lm-eval can run: those of this project, those of a user's folder, and lm-eval's own.

    The index of its own tasks is read only when needed, as that takes a while.
    """

    def __init__(self, folder: str = "") -> None:
        from lm_eval.tasks import TaskManager

        if folder and not os.path.isdir(Path(folder).expanduser()):
            raise UserError(f"config.evaluation.task_folder={folder!r}: is no folder")
        self._folders = [str(FOLDER), *([str(Path(folder).expanduser().absolute())] if folder else [])]
        self._manager = TaskManager(include_path=self._folders, include_defaults=False)
        self._complete = False

    def find(self, name: str) -> Any:
        """The manager that knows a task, or None if it is one of WITHOUT_FILE. Raises: UserError on an unknown name."""
        if name in WITHOUT_FILE and name not in self._manager.task_index:
            return None
        if name not in self._manager.task_index and not self._complete:
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager(include_path=self._folders, include_defaults=True)
            self._complete = True
        if name in self._manager.task_index:
            return self._manager
        near = difflib.get_close_matches(name, [*LISTS, *self._manager.all_tasks], n=3)
        raise UserError(
            f"config.evaluation.tasks={name!r}: no such task" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )


@functools.cache
def catalogue(folder: str = "") -> Tasks:
    """The tasks with a user's folder, read once."""
    return Tasks(folder)


def asked(config: ConfigDict) -> list[tuple[str, int | None]]:
    """Names and shots of `config.evaluation.tasks`. Raises: UserError where there are none."""
    try:
        tasks = parse(config.evaluation.tasks)
    except ValueError as error:
        raise UserError(f"config.evaluation.tasks: {error}") from None
    if not tasks:
        raise UserError(f"config.evaluation.tasks='': name tasks of lm-eval, or one of the lists {', '.join(LISTS)}")
    return tasks


def check(config: ConfigDict) -> None:
    """Raises UserError where lm-eval is not installed or does not know a task."""
    prepare()
    for name, _ in asked(config):
        catalogue(config.evaluation.task_folder).find(name)


def evaluate(
    model: "HarnessModel", tasks: list[tuple[str, int | None]], folder: str = "", limit: int | None = None
) -> dict[str, dict]:
    """Figures of each task, of each task of a group, and of the group.

    Args:
      model: an `lm_eval.api.model.LM`.
      tasks: names of tasks, groups or tags, and how many examples stand in the prompt (None: as the task has it).
      folder: more task files.
      limit: the most documents of each task.

    Returns:
      Metrics by name, standard errors as `<metric>_stderr`, and `examples`, the number of documents; or
      {"not_served": reason} where the data cannot be had, or the model's context or memory is too small.
    """
    prepare()
    import lm_eval

    options: dict[str, Any] = dict(limit=limit, bootstrap_iters=RESAMPLES, log_samples=False, verbosity=None)
    result = {}
    for name, shots in tasks:
        manager = catalogue(folder).find(name)
        if manager is None:
            result[name] = {
                "not_served": "lm-eval has no such task; put a file of it into config.evaluation.task_folder"
            }
            continue
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a download, a cache or a task's own code may raise
            result[name] = {"not_served": f"its data cannot be had here: {_last_line(error)}"}
            continue
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", (task.get_config("num_fewshot") or 0) if shots is None else shots)
            task.set_fewshot_seed(1234)  # lm-eval's own
        with contextlib.redirect_stdout(sys.stderr):
            found = memory.served(functools.partial(lm_eval.evaluate, model, loaded, **options))
        if "not_served" in found:
            result[name] = found
            continue
        for part, values in found["results"].items():
            examples = found["n-samples"].get(part, {}).get("effective")
            result[part] = _metrics(values) | ({} if examples is None else {"examples": examples})
    return result


def _metrics(values: dict) -> dict[str, float]:
    """The numbers among the results of a task. `acc,none` becomes `acc`; `exact_match,first_word` keeps its name."""
    numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name.removesuffix(",none"): value for name, value in numbers.items() if "," in name}


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1][:200]}"


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """The figures of the config's tasks; `limit` counts documents of each. Raises: UserError where none is served."""
    prepare()
    from seqmodels.evals.harness_model import HarnessModel

    model = HarnessModel(
        run.model,
        run.params,
        run.dataset.tokenizer,
        piece=run.config.seq_len,
        batch_size=run.batch_size,
        context=context(run.config),
        mesh=run.mesh,
        seed=run.config.seed,
    )
    result = evaluate(model, asked(run.config), run.config.evaluation.task_folder, limit)
    if all("not_served" in values for values in result.values()):
        raise UserError("; ".join(f"{task} is not served: {values['not_served']}" for task, values in result.items()))
    return {"lm_eval": result}


def _rows(result: dict):
    """(task, metric, value, standard error or None) of every figure."""
    for task, values in result["lm_eval"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if name not in ("examples", "not_served") and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr" + (f",{kind}" if kind else ""))
                yield task, name, value, stderr


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def table(result: dict) -> str:
    lines = [f"{'task':<24}{'metric':<28}{'value':>12}{'±':>10}{'examples':>10}"]
    for task, metric, value, stderr in _rows(result):
        examples = result["lm_eval"][task].get("examples")
        lines.append(
            f"{task:<24}{metric:<28}{_short(value):>12}{'' if stderr is None else _short(stderr):>10}"
            f"{'' if examples is None else f'{examples:,}':>10}"
        )
    reasons = {task: v["not_served"] for task, v in result["lm_eval"].items() if "not_served" in v}
    return "\n".join([*lines, *(f"{task:<24}not served: {reason}" for task, reason in reasons.items())])


def plot(axes: "Axes", result: dict) -> None:
    shares = [row for row in _rows(result) if row[1].split(",")[0] in ("acc", "acc_norm", "exact_match", "f1")]
    for place, (_, _, value, stderr) in enumerate(shares):
        axes.barh(place, value, xerr=stderr, color="tab:blue", height=0.6)
    axes.set_yticks(range(len(shares)), [f"{task}: {metric}" for task, metric, _, _ in shares])
    axes.set(xlim=(0, 1), xlabel="share that is right", title="lm-eval")
    axes.invert_yaxis()
