"""Trains a model: python train.py --config=configs/densemamba.py [--workdir=runs/densemamba] [--config.steps=500]

The run directory holds all that the run makes. The same command goes on with an interrupted run, bit for bit;
with --config.steps raised, it trains a finished run further. Exit status: 0 done, 1 a mistake in the command,
75 interrupted after a checkpoint was saved, 130 or 143 interrupted (SIGINT, SIGTERM) when there was nothing to save.
"""

import sys

from absl import flags

from seqmodels import cli
from seqmodels.errors import UserError, describe
from seqmodels.scripts import as_typed


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    cli.define_config(flag_values, argv)
    flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> if left out.", flag_values=flag_values)
    flags.DEFINE_bool("distributed", False, "This is one process of a job of several, each running this command.",
                      flag_values=flag_values)  # fmt: skip


def main(flag_values: flags.FlagValues) -> None:
    config = flag_values.config
    if flag_values.distributed:
        cli.join_job()
    cli.use_platform(config.platform)

    from seqmodels.evals.memory import exhausted  # after use_platform: they import JAX
    from seqmodels.training.loop import train

    try:
        train(config, cli.folder_of(flag_values.workdir or f"runs/{config.name}"))
    except Exception as error:
        if not exhausted(error):
            raise
        raise UserError(f"{describe(error)}: lower config.batch_size or the model, or raise "
                        "config.training.accumulate") from error  # fmt: skip


def command() -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(main, define, as_typed(__doc__))


if __name__ == "__main__":
    sys.exit(command())
