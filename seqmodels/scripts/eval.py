"""Evaluates a trained model, or lets it continue a prompt.

  python eval.py --workdir=runs/densemamba
  python eval.py --workdir=runs/densemamba --evals=throughput,lm_eval --tasks=endings,cloze
  python eval.py --workdir=runs/densemamba --prompt="It is a truth" --tokens=200 --temperature=0.8 --top_p=0.95

The first prints perplexity and bits per byte by split, loss by position in the context and at longer contexts (or what
the run's config.evals names), and writes them to eval.json and eval.png in the run directory. Exit status: 0 done, 1 a
mistake in the command, or an evaluator that cannot serve, 130 or 143 interrupted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from seqmodels import cli, compiled, job
from seqmodels.errors import UserError
from seqmodels.fields import Field
from seqmodels.fields.run import EVALUATION, ROOT, defaults
from seqmodels.scripts import as_typed

OF_PROMPT = ("tokens", "temperature", "top_k", "top_p", "seed", "stop")
OF_EVALUATION = ("out", "splits", "evals", "tasks", "extrapolate", "limit")

if TYPE_CHECKING:  # it imports JAX, which comes after use_platform
    from seqmodels.evals.run import Run

KEPT = ("config.json", "summary.json", "metrics.jsonl", "trial.json", "sweep.json")  # not to be replaced by results


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    values: dict[str, Any] = dict(flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "Run directory, as train.py made it.", **values)
    flags.DEFINE_string("step", "latest", "Checkpoint: latest, best, or the number of a step.", **values)
    cli.define_distributed(flag_values)
    flags.DEFINE_string("platform", "", "cpu, gpu or tpu; what is there if left out.", **values)
    flags.DEFINE_string("out", None, "JSON file; eval.json in the run directory if left out.", **values)
    flags.DEFINE_list("splits", ["validation", "test"], "Splits to read.", **values)
    flags.DEFINE_list("evals", [], "Evaluators by name; config.evals if left out, or the usual ones.", **values)
    flags.DEFINE_string("tasks", None, "Of --evals=lm_eval, in place of config.evaluation.tasks.", **values)
    flags.DEFINE_string("extrapolate", None, "Methods of --evals=extrapolation, apart by commas, in place of "
                        "config.evaluation.extrapolate.", **values)  # fmt: skip
    flags.DEFINE_integer("limit", None, "Rows (spread over a split), examples or documents to read; all if left out.",
                         lower_bound=1, **values)  # fmt: skip
    flags.DEFINE_integer("batch_size", None, "Rows at once; the run's if left out.", lower_bound=1, **values)
    flags.DEFINE_string("prompt", None, "Text to continue, in place of an evaluation.", **values)
    flags.DEFINE_integer("tokens", 200, "Tokens to add to the prompt.", **values)
    flags.DEFINE_float("temperature", 0.8, "Of sampling; 0 is greedy.", **values)
    flags.DEFINE_integer("top_k", 0, "Sample from the k likeliest tokens; 0 is all.", **values)
    flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that have this probability.", **values)
    flags.DEFINE_integer("seed", 0, "Of sampling.", **values)
    flags.DEFINE_string("stop", None, "Text at which the continuation ends.", **values)
    options = ConfigDict({"evaluation": defaults().evaluation, "data": defaults().data})
    cli.check_overrides(options, argv)
    config_flags.DEFINE_config_dict("config", options, "Fields of evaluation and data, in place of the run's.",
                                    flag_values=flag_values, sys_argv=argv)  # fmt: skip


def main(flag_values: flags.FlagValues) -> None:
    if flag_values.workdir is None:
        raise UserError("--workdir is missing; for example --workdir=runs/densemamba")
    with cli.run_folder(flag_values.workdir) as workdir:
        _in(workdir, flag_values)


def _in(workdir: Path, flag_values: flags.FlagValues) -> None:
    """What `main` does, in a run directory."""
    out = _out(flag_values.out, workdir)
    check(flag_values)
    if flag_values.prompt is None and (flag_values.out or workdir.is_dir()):  # else the message is of the workdir
        cli.check_writable(out)
    with cli.joined(flag_values):
        _evaluate(flag_values, workdir, out)


def _evaluate(flag_values: flags.FlagValues, workdir: Path, out: Path) -> None:
    cli.use_platform(flag_values.platform)
    compiled.use()

    import jax
    from flax import linen as nn

    from seqmodels.evals.run import load_run
    from seqmodels.training.sharding import RULES

    overrides = config_flags.get_override_values(flag_values["config"])
    for name in ("tasks", "extrapolate"):
        if getattr(flag_values, name) is not None:
            overrides[f"evaluation.{name}"] = getattr(flag_values, name)
    prompted = flag_values.prompt is not None
    run = load_run(workdir, flag_values.step, flag_values.batch_size or 0, overrides, text=not prompted)
    with jax.set_mesh(run.mesh), nn.logical_axis_rules(RULES):
        if prompted:
            say(flag_values.prompt + continuation(run, flag_values))
        else:
            evaluate(run, flag_values, out)


def check(flag_values: flags.FlagValues) -> None:
    """Checks the flags by themselves, before anything is loaded. Raises: UserError."""
    prompted = flag_values.prompt is not None
    for name in OF_EVALUATION if prompted else OF_PROMPT:
        if flag_values[name].present:
            what = "is for an evaluation, not for --prompt" if prompted else "is for --prompt, which is missing"
            raise UserError(f"--{name}={flag_values[name].value}: {what}")
    for name, value in (("prompt", flag_values.prompt), ("stop", flag_values.stop)):
        if value is not None:
            Field("", "").check(name, value, prefix="--")
    for name in ("splits", "evals"):
        values = getattr(flag_values, name)
        if (flag_values[name].present or name == "splits") and not all(map(str.strip, values or [""])):
            raise UserError(f"--{name}={','.join(values)}: must be one or more names, apart by commas")
    if flag_values.extrapolate is not None:
        EVALUATION.fields["extrapolate"].check("extrapolate", flag_values.extrapolate, prefix="--")
    ROOT.fields["seed"].check("seed", flag_values.seed, prefix="--")
    for name in ("tokens", "top_k", "limit", "batch_size"):
        if getattr(flag_values, name) is not None:
            Field(0, "").check(name, getattr(flag_values, name), prefix="--")


def continuation(run: "Run", flag_values: flags.FlagValues) -> str:
    """What follows --prompt."""
    from seqmodels.backbone import context
    from seqmodels.generation import generate

    names = ("tokens", "temperature", "top_k", "top_p", "seed", "stop")
    return generate(
        run.model,
        run.params,
        run.dataset.tokenizer,
        flag_values.prompt,
        context=context(run.config),
        **{name: getattr(flag_values, name) for name in names},
    )


def _out(given: str | None, workdir: Path) -> Path:
    """The JSON file to write. Raises: UserError where it, or the picture beside it, would replace another file."""
    out = workdir / "eval.json" if given is None else cli.folder_of(given)
    if out.name in ("", *KEPT) or out.with_suffix(".png").name in (out.name, "loss.png"):
        raise UserError(f"--out={given}: must be the name of a new .json file; the picture gets that name with .png")
    return out


def evaluate(run: "Run", flag_values: flags.FlagValues, out: Path) -> None:
    """Run the evaluators, print their tables, write JSON and picture."""
    from seqmodels import evals
    from seqmodels.evals import report

    field = "--evals" if flag_values.evals else "config.evals"
    evaluators = evals.find(flag_values.evals or evals.named(run.config) or evals.default(run), field)
    for name, evaluator in (("tasks", "lm_eval"), ("extrapolate", "extrapolation")):
        if (value := getattr(flag_values, name)) is not None and evaluator not in evaluators:
            raise UserError(f"--{name}={value}: is for --evals={evaluator}, which is not among the evaluators")
    evals.check(evaluators, run, field)
    for split in flag_values.splits:
        run.dataset[split]  # a UserError now rather than after the first split
    options: dict[str, Any] = dict(splits=flag_values.splits, limit=flag_values.limit, out=out)
    if any(name.startswith("data.") for name in config_flags.get_override_values(flag_values["config"])):
        options["about"] = {"data": {"name": run.config.data.name, "path": run.config.data.get("path", "")}}
    _, failed = report.evaluate(run, evaluators, **options, say=say, write=job.current().main)
    if failed:
        raise UserError("; ".join(failed))


def say(text: str) -> None:
    if job.current().main:
        print(text, flush=True)


def command() -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(main, define, as_typed(__doc__))


if __name__ == "__main__":
    sys.exit(command())
