"""Every field of every config with odd values, and every flag of the three commands: refused in one line that names the
field, or accepted, kept as it was given, and fit to be built. No traceback, nothing silent.

Kinds: tracebacks, silent nonsense, work that is thrown away at the end. The quick part draws a few hundred values; the
slow one reads 2,000 command lines by the commands' own parsers, up to the point where something would be compiled.
FUZZ=1000 in the environment tries that many values of each config.
"""

import collections
import contextlib
import io
import json
import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.evals import run as evals_run
from seqmodels.scripts import eval as eval_script
from seqmodels.scripts import sweep as sweep_script
from seqmodels.scripts import train as train_script
from seqmodels.training.run import write_config
from tests import fuzzing

MANY = int(os.environ.get("FUZZ", "100"))  # values of each config
OPTIONS = dict(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # a smaller example takes minutes to find
)


def cases(name):
    fields = fuzzing.fields_of(name)
    return st.sampled_from(sorted(fields)).flatmap(
        lambda field: st.tuples(st.just(field), fuzzing.values_of(fields[field]))
    )


def check_field(name, field, value):
    """The property. Returns whether the value was accepted."""
    config = fuzzing.with_value(name, field, value)
    try:
        fuzzing.validate(config)
        fuzzing.check_accepted(config)
    except UserError as error:
        assert "\n" not in str(error) and field.split(".")[-1] in str(error), (field, error)
        return False
    assert fuzzing.shown_in(config, field, value)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densemamba", "synthetic", "transformer"])
def test_odd_values_of_fields(name):
    """A few for some configs; test_many_odd_values_of_fields has more."""
    counts = collections.Counter()

    @settings(max_examples=40, **OPTIONS)
    @given(cases(name))
    def check(case):
        counts[check_field(name, *case)] += 1

    check()
    assert counts[True] and counts[False]


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzzing.CONFIGS)
def test_many_odd_values_of_fields(name):
    @settings(max_examples=MANY, **OPTIONS)
    @given(cases(name))
    def check(case):
        check_field(name, *case)

    check()


def fields_by_config():
    """(config, field) once for each declaration: most configs share most of their fields."""
    seen = {}
    for name in fuzzing.CONFIGS:
        for field, declared in fuzzing.fields_of(name).items():
            seen.setdefault((field, declared), name)
    return [(name, field) for (field, _), name in seen.items()]


def test_no_type_is_taken_for_another():
    """Every field with every value that is of none of its kind: all of the list, not a sample."""
    for name, field in fields_by_config():
        for value in (None, object, float("nan"), 10**5000, {"a": 1}, [[1]], "\x00"):
            try:
                fuzzing.validate(fuzzing.with_value(name, field, value))
            except UserError as error:
                assert "\n" not in str(error) and field.split(".")[-1] in str(error), (name, field, value, error)
            else:
                raise AssertionError(f"{name}: {field}={value!r} was accepted")


# Command lines


def arguments_of(value):
    """A value as somebody types it."""
    try:
        return str(value)
    except ValueError:
        return "9" * 5000


def flag_values():
    """Odd values as texts, for flags."""
    return st.one_of(
        st.sampled_from([arguments_of(v) for v in (*fuzzing.NUMBERS, *fuzzing.TEXTS, *fuzzing.LISTS)]),
        st.text(max_size=10),
    )


FLAGS = {
    "train": ("workdir", "distributed", "config"),
    "eval": ("workdir", "step", "platform", "out", "splits", "evals", "tasks", "limit", "batch_size", "prompt",
             "tokens", "temperature", "top_k", "top_p", "seed", "stop"),
    "sweep": ("sweep", "out", "seeds", "evals", "parallel", "per_gpu", "slurm", "retry", "metric", "compare", "config"),
}  # fmt: skip


class Commands:
    """The three commands in this process, each up to the point where it would compile, load or start something."""

    def __init__(self, folder, monkeypatch):
        self.workdir = folder / "run"
        write_config(self.workdir, fuzzing.config_of("densemamba"))
        self.folder = folder
        monkeypatch.setattr(evals_run, "_checkpoint_step", self._stop)
        monkeypatch.setattr(ConfigDict, "__str__", lambda config: "config")  # flags print their defaults, slowly
        self.seen = None

    def _stop(self, workdir, config, step):
        self.seen = dict(cli.fields(config))
        raise UserError("stopped before loading")

    def train_main(self, flags):
        fuzzing.validate(flags.config)
        fuzzing.check_accepted(flags.config)
        self.seen = dict(cli.fields(flags.config))

    def sweep_main(self, flags):
        status = sweep_script.main(flags)
        if flags.spec is not None:
            self.seen = dict(cli.fields(flags.config))
        return status

    def call(self, command, argv):
        """(exit status, lines on stderr). Any exception is a failure."""
        self.seen = None
        main, define = {
            "train": (self.train_main, train_script.define),
            "eval": (eval_script.main, eval_script.define),
            "sweep": (self.sweep_main, sweep_script.define),
        }[command]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = cli.run(main, define, "Doc.", [f"{command}.py", *argv])
        return status, said.getvalue()


def command_lines():
    """(command, name of the field or flag, the text given to it)."""
    fields = fuzzing.fields_of("densemamba")
    typed = st.sampled_from(sorted(fields)).flatmap(
        lambda field: st.tuples(st.just(f"config.{field}"), fuzzing.values_of(fields[field]).map(arguments_of))
    )
    ours = [f for f in sorted(fields) if f.startswith(("evaluation.", "data."))]
    of_eval = st.sampled_from(ours).flatmap(
        lambda field: st.tuples(st.just(f"config.{field}"), fuzzing.values_of(fields[field]).map(arguments_of))
    )

    def flags(command):
        return st.tuples(st.sampled_from(FLAGS[command]), flag_values())

    train = st.one_of(typed, typed, typed, flags("train"))
    sweep = st.one_of(typed, flags("sweep"))
    return st.one_of(
        st.tuples(st.just("train"), train),
        st.tuples(st.just("eval"), st.one_of(of_eval, flags("eval"))),
        st.tuples(st.just("sweep"), sweep),
    )


def check_line(commands, command, name, text):
    """The property of a command line. Returns "refused" or "accepted"."""
    argv = [] if name == "config" else ["--config=configs/densemamba.py"] if command != "eval" else []
    if command == "eval":
        argv = [f"--workdir={commands.workdir}"]
    elif name != "config":
        argv += ["--config.model.width=32", "--config.model.repeats=2"]
    if command == "sweep":
        argv += [f"--out={commands.folder / 'sweep'}", "--engine=print", "--sweep=pair"]
    status, said = commands.call(command, [*argv, f"--{name}={text}"])
    if commands.seen is None or status:
        stopped = commands.seen is not None and "stopped before loading" in said
        if not stopped:
            assert status == 1 and said.startswith("error: ") and said.count("\n") == 1, (
                command,
                name,
                text[:99],
                said,
            )
            assert name.split(".")[-1] in said or text[:50] in said, (command, name, text[:99], said)
            return "refused"
    if name.startswith("config.") and isinstance(found := commands.seen.get(name[7:]), str):
        assert found == text, (name, found, text)
    return "accepted"


def fuzz_lines(tmp_path, monkeypatch, examples):
    commands, counts = Commands(tmp_path, monkeypatch), collections.Counter()

    @settings(max_examples=examples, **OPTIONS)
    @given(command_lines())
    def check(line):
        command, (name, text) = line
        counts[command, check_line(commands, command, name, text)] += 1

    check()
    print(json.dumps({" ".join(key): number for key, number in sorted(counts.items())}))
    return counts


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_odd_command_lines(tmp_path, monkeypatch):
    counts = fuzz_lines(tmp_path, monkeypatch, 100)
    assert all(counts[command, "refused"] for command in FLAGS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_thousand_odd_command_lines(tmp_path, monkeypatch):
    counts = fuzz_lines(tmp_path, monkeypatch, 2000)
    assert sum(counts.values()) >= 2000
