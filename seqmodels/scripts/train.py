"""Trains a model: python train.py --config=configs/densemamba.py [--workdir=runs/densemamba] [--config.steps=500]

The run directory holds all that the run makes. The same command goes on with an interrupted run, bit for bit;
with --config.steps raised, it trains a finished run further. With --plan nothing is trained: the command prints what
the config needs (parameters, cache, training state, operations), and uses no device. Exit status: 0 done, 1 a mistake
in the command, 75 interrupted after a checkpoint was saved, 130 or 143 interrupted (SIGINT, SIGTERM) when there was
nothing to save.
"""

import sys
from typing import Any

from absl import flags

from seqmodels import cli, cloud, compiled
from seqmodels.atomic import json_text, replace_file, writing
from seqmodels.errors import UserError, describe
from seqmodels.fields import Field, at_least
from seqmodels.scripts import as_typed


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    values: dict[str, Any] = dict(flag_values=flag_values)
    cli.define_config(flag_values, argv)
    flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> if left out.", **values)
    flags.DEFINE_bool("distributed", False, "This is one process of a job of several, each running this command.",
                      **values)  # fmt: skip
    flags.DEFINE_bool("plan", False, "Print what the config needs, and train nothing.", **values)
    flags.DEFINE_integer("context", None, "With --plan: tokens of the sequence whose cache and state are counted; "
                         "config.seq_len if left out.", **values)  # fmt: skip
    flags.DEFINE_string("out", None, "With --plan: JSON file for the numbers.", **values)


def main(flag_values: flags.FlagValues) -> None:
    config = flag_values.config
    for name in ("context", "out"):
        if (value := getattr(flag_values, name)) is not None and not flag_values.plan:
            raise UserError(f"--{name}={value}: is for --plan, which is missing")
    if flag_values.plan:
        return plan(flag_values)
    if flag_values.distributed:
        cli.join_job()
    cli.use_platform(config.platform)
    compiled.use()

    from seqmodels.evals.memory import exhausted  # after use_platform: they import JAX
    from seqmodels.training.loop import train

    try:
        workdir = flag_values.workdir or f"runs/{config.name}"
        train(config, workdir if cloud.is_cloud(workdir) else cli.folder_of(workdir))
    except Exception as error:
        if not exhausted(error):
            raise
        raise UserError(f"{describe(error)}: lower config.batch_size or the model, or raise "
                        "config.training.accumulate") from error  # fmt: skip


def plan(flag_values: flags.FlagValues) -> None:
    """Prints the plan of the config, and writes it to --out."""
    context, out = flag_values.context, flag_values.out
    if context is not None:
        Field(1, "", at_least(1)).check("context", context, prefix="--")
    path = None if out is None else cli.folder_of(out)
    if path:
        cli.check_writable(path)
    cli.use_platform("cpu")  # only shapes are computed

    from seqmodels.training.plan import make_plan, text  # after use_platform: it imports JAX

    made = make_plan(flag_values.config, context)
    print(text(made, assumed=flag_values.config.mesh.data == -1), flush=True)
    if path:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json_text(made))


def command() -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(main, define, as_typed(__doc__))


if __name__ == "__main__":
    sys.exit(command())
