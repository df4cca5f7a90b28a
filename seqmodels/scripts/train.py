"""Trains a model: python train.py --config=configs/densemamba.py [--workdir=runs/densemamba] [--config.steps=500]

The run directory holds all that the run makes. The same command goes on with an interrupted run, bit for bit;
with --config.steps raised, it trains a finished run further. With --plan nothing is trained: the command prints what
the config needs (parameters, cache, training state, operations), and uses no device. Exit status: 0 done, 1 a mistake
in the command, 75 interrupted after a checkpoint was saved, 130 or 143 interrupted (SIGINT, SIGTERM) when there was
nothing to save.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from seqmodels import cli, cloud, compiled
from seqmodels.atomic import json_text, replace_file, writing
from seqmodels.errors import UserError, describe
from seqmodels.fields import Field, at_least
from seqmodels.scripts import as_typed


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    values: dict[str, Any] = dict(flag_values=flag_values)
    cli.define_config(flag_values, argv)
    flags.DEFINE_string("workdir", None, "Run directory; runs/<config name> if left out.", **values)
    cli.define_distributed(flag_values)
    flags.DEFINE_bool("plan", False, "Print what the config needs, and train nothing.", **values)
    flags.DEFINE_integer("context", None, "With --plan: tokens of the sequence whose cache and state are counted; "
                         "config.seq_len if left out.", **values)  # fmt: skip
    flags.DEFINE_string("topology", None, "With --plan: chips that the step is compiled for, which need not be here, "
                        "such as v5p:8x8x4, v6e:16x16, h100:64 or h200:2.", **values)  # fmt: skip
    flags.DEFINE_string("out", None, "With --plan: JSON file for the numbers.", **values)


def main(flag_values: flags.FlagValues) -> None:
    config = flag_values.config
    for name in ("context", "topology", "out"):
        if (value := getattr(flag_values, name)) is not None and not flag_values.plan:
            raise UserError(f"--{name}={value}: is for --plan, which is missing")
    if flag_values.plan:
        return plan(flag_values)
    with cli.joined(flag_values):
        workdir = flag_values.workdir or f"runs/{config.name}"
        _train(config, workdir if cloud.is_cloud(workdir) else cli.folder_of(workdir))


def _train(config: ConfigDict, workdir: Path | str) -> None:
    cli.use_platform(config.platform)
    compiled.use()

    from seqmodels.evals.memory import exhausted  # after use_platform: they import JAX
    from seqmodels.training.loop import train

    try:
        train(config, workdir)
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
    from seqmodels.training import foresee, topology  # they import JAX
    from seqmodels.training.plan import make_plan, text

    config, chips = flag_values.config, flag_values.topology and topology.parse(flag_values.topology)
    if chips:
        config = foresee.fitted(config, chips)
        topology.prepare(chips)
    cli.use_platform("cpu")  # only shapes are computed
    made = make_plan(config, context)
    print(text(made, assumed=config.mesh.data == -1), flush=True)
    if chips:
        made["topology"] = foresee.foresee(config, chips)
        print(f"\n{foresee.text(made['topology'], made['tokens_per_step'])}", flush=True)
    if path:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json_text(made))


def command() -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(main, define, as_typed(__doc__))


if __name__ == "__main__":
    sys.exit(command())
