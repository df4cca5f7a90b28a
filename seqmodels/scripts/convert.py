"""Weights from Hugging Face, and back, with the tokenizer.

  python convert.py --from=SmolLM2-135M --workdir=runs/smollm2
  python convert.py --workdir=runs/mamba --export=mamba-small

The first makes a run directory, for eval.py (also with --prompt), and as the start of a training:
--config=runs/smollm2/config.json --config.training.start=runs/smollm2 --workdir=runs/tuned. --config.field=value sets
fields of its config. The second writes config.json, weights and tokenizer, as transformers reads them. docs/interop.md
lists the models. Exit status: 0 done, 1 a mistake in the command, or files that cannot be converted.
"""

import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.fields.rules import one_of
from seqmodels.interop.pretrained import DTYPES
from seqmodels.scripts import as_typed

OF_EXPORT = ("step", "dtype")


def define(flag_values: flags.FlagValues, argv: list[str]) -> None:
    values: dict[str, Any] = dict(flag_values=flag_values)
    flags.DEFINE_string("from", None, "Directory with config.json and weights of a model that is to be imported.",
                        **values)  # fmt: skip
    flags.DEFINE_string("workdir", None, "Run directory that is made, or with --export read.", **values)
    flags.DEFINE_string("export", None, "Directory that is written for transformers.", **values)
    flags.DEFINE_string("step", "latest", "Of --export: checkpoint, as latest, best or the number of a step.", **values)
    flags.DEFINE_string(
        "dtype", "float32", "Of --export: dtype of the tensors; float32, bfloat16 or float16.", **values
    )
    flags.DEFINE_string("platform", "", "cpu, gpu or tpu; what is there if left out.", **values)
    source, workdir = (_last(argv, name) for name in ("from", "workdir"))
    if source is not None:
        from seqmodels.interop.runs import config_of

        config = config_of(cli.folder_of(source), cli.folder_of(workdir or "imported"))
        cli.check_overrides(config, argv)
        config_flags.DEFINE_config_dict("config", config, f"Of the model in {source}.", flag_values=flag_values,
                                        sys_argv=argv)  # fmt: skip


def _last(argv: list[str], flag: str) -> str | None:
    """The value that the arguments give to a flag: the last one, or None."""
    value = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(rf"--?{flag}(?:=(.*))?", argument, re.DOTALL):
            value = following if match[1] is None else match[1]
    return value


def main(flag_values: flags.FlagValues) -> None:
    source, target = (getattr(flag_values, name) for name in ("from", "export"))
    if (source is None) == (target is None):
        both = "" if source is None else ", not both"
        raise UserError(f"--from=DIR (to import) or --export=DIR (to export) is needed{both}")
    if not flag_values.workdir:
        raise UserError("--workdir is missing; for example --workdir=runs/imported")
    if not one_of(*DTYPES).test(flag_values.dtype):
        raise UserError(f"--dtype={flag_values.dtype}: must be one of {', '.join(DTYPES)}")
    for name in OF_EXPORT:
        if source is not None and flag_values[name].present:
            raise UserError(f"--{name}={flag_values[name].value}: is for --export, which is missing")
    workdir = cli.folder_of(flag_values.workdir)
    cli.use_platform(flag_values.platform)

    from seqmodels.interop import runs  # after use_platform: it imports JAX

    if source is not None:
        made = runs.import_run(cli.folder_of(source), workdir, flag_values.config)
        print(f"{workdir}: {made['parameters']:,} parameters", flush=True)
        return
    written = runs.export_run(workdir, cli.folder_of(target), flag_values.step, flag_values.dtype)
    without = "" if written["tokenizer"] else "; the tokens of a synthetic task have no tokenizer"
    print(f"{target}: the model after step {written['step']}{without}", flush=True)


def command() -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(main, define, as_typed(__doc__))


if __name__ == "__main__":
    sys.exit(command())
