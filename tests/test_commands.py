"""Every command of the documentation: read to its end by the program that it names, run, or left out for a reason.

The shell itself takes the pages apart: it runs their blocks with no program in its path, and writes down what it would
have started. So loops and variables are those that a reader gets.
"""

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels import cli
from seqmodels.config import validate
from seqmodels.configs import mamba
from seqmodels.interop import runs
from seqmodels.scripts import convert, sweep, train
from seqmodels.scripts import eval as evaluate
from seqmodels.sweeps import definition
from seqmodels.training.run import write_config
from tests.run_fixtures import write_text

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]
SCRIPTS = {"train": train, "eval": evaluate, "sweep": sweep, "convert": convert}

# Programs of others: not run, as they need a network, a cluster, or the rights of root
OTHERS = {
    "apt-get", "cp", "dpkg-deb", "find", "gcloud", "gcsfuse", "git", "parallel", "pip", "scontrol", "unzip",
}  # fmt: skip
STARTERS = ("python", "pytest", "make", "seqmodels-", "srun", "timeout", *OTHERS)
SHELL = re.compile(rf"(for \w+ in |(\w+=\S* )*({'|'.join(STARTERS)})[\w-]*( |$))")
NO_FILES = (".ci/run", ".venv/bin/activate")  # commands with a path, which the shell cannot start where it runs


# What the shell does in place of what it cannot find, and of what would end it or needs files.
CATCH = """
command_not_found_handle() { printf '%s\\0' "$@" ";" >> "$OUT"; }
exit() { :; }
cd() { :; }
find() { echo found; }
"""


def blocks(page):
    """The blocks of a page that are for a shell: fenced, indented, or in a line of prose."""
    text = page.read_text()
    if page.suffix == ".py":
        lines = re.search(r"^Command:((?:.*\\\n)*.*(?:\n {8,}.*)*)", text, re.MULTILINE)
        return [lines[1]] if lines else []
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = [block for tag, block in fence.findall(text) if tag in ("", "bash", "sh")]
    text = fence.sub("", text)
    found += re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    prose = re.sub(r"^    .*\n", "", text, flags=re.MULTILINE)
    found += [one for one in re.findall(r"`((?:python|make|pip) [^`]+)`", prose.replace("\n", " ")) if "..." not in one]
    return [block for block in found if any(SHELL.match(line.strip()) for line in block.split("\n"))]


def shell(script, folder):
    """The commands that a script starts: a list of arguments for each."""
    out = folder / "commands"
    out.write_text("")
    environment = {"OUT": str(out), "PATH": "/nowhere"}
    done = subprocess.run(
        ["/bin/bash"], input=CATCH + script, cwd=folder, env=environment, capture_output=True, text=True
    )
    strange = [line for line in done.stderr.splitlines() if not any(name in line for name in NO_FILES)]
    assert not strange, f"{strange}\n{script}"
    commands = [part.split("\0")[:-1] for part in out.read_text().split(";\0")]
    return [command for command in commands if command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed: a checkout, with the runs whose configs are read."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "benchmarks", "tests", "docs", "Makefile", *(path.name for path in ROOT.glob("*.txt"))):
        (place / name).symlink_to(ROOT / name)
    for name in ("llama", "smollm2"):
        write_config(place / "runs" / name, mamba.get_config())
    return place


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Every command with the page that it is on."""
    empty = tmp_path_factory.mktemp("empty")
    found = {}
    for page in PAGES:
        for arguments in shell("\n".join(blocks(page)), empty):
            found.setdefault(tuple(arguments), page.relative_to(ROOT))
    return found


class Read(Exception):
    """A command was read to its end."""


def read(main, define, doc, argv=None):
    """In place of `cli.run`: reads the flags and checks the config, and for a sweep every trial."""
    flag_values, argv = cli.flags.FlagValues(), list(argv or sys.argv)
    define(flag_values, argv)
    helped = [argument for argument in argv if argument != "--help"]
    rest = flag_values(helped)
    assert len(rest) == 1, f"{rest[1:]} are no flags"
    config = flag_values["config"].value if "config" in flag_values else None
    if main is evaluate.main:
        evaluate.check(flag_values)
    elif main is convert.main:
        assert bool(flag_values.workdir)
    elif main is sweep.main and flag_values.spec:
        # the trials of every named sweep are checked with the configs (tests/test_fields.py)
        module = cli.load_module(flag_values.spec)
        named = flag_values.sweep or ("" if flag_values.grid else "ablation")
        assert not named or named in {"ablation"} | getattr(module, "SWEEPS", {}).keys(), f"no sweep {named}"
        if flag_values.grid:
            assert definition.define(flag_values.spec, config, "", 1, Path("sweeps"), "none", flag_values.grid)
    elif main is train.main:
        validate(config)
    raise Read


def check(arguments, folder):
    """Reads a command. Raises AssertionError for one of which this does not know how."""
    program, *rest = arguments
    if program in ("srun", "timeout"):
        return check(rest[program == "timeout" :], folder)
    if rest[:2] == ["-m", "seqmodels.launch"]:  # N SCRIPT FLAGS
        return check(["python", *rest[3:]], folder)
    if rest[:2] == ["-m", "seqmodels.training.goodput"]:
        assert not any(word.startswith("-") for word in rest[2:])  # run directories
        return
    if program == "gcloud":  # what it runs elsewhere
        for each in (argument.partition("=")[2] for argument in rest if argument.startswith("--command=")):
            for inner in shell(each, folder):
                check(inner, folder)
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(word for word in rest if "=" not in word) in targets
        rest = [word.partition("=")[2] for word in rest if word.startswith("REQUIREMENTS=")]
        assert all((ROOT / name).is_file() for name in rest)
    elif program == "pytest" or rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    elif program == "pip" and "-r" in rest:
        assert (ROOT / rest[rest.index("-r") + 1]).is_file()
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "the command", "exec")
    elif program == "python" or program.startswith("seqmodels-"):
        script = program.removeprefix("seqmodels-") if program != "python" else rest[0].removesuffix(".py")
        options = rest if program != "python" else rest[1:]
        with pytest.raises(Read):
            if script in SCRIPTS:
                read(SCRIPTS[script].main, SCRIPTS[script].define, "", [f"{script}.py", *options])
            else:
                module = script == "-m"
                file = ROOT / (f"{options[0].replace('.', '/')}.py" if module else rest[0])
                file = file if file.is_file() else file.with_suffix("") / "__main__.py"
                sys.argv = rest[module:]
                if len(sys.argv) == 1:
                    raise Read  # the name of a program, which may need flags
                runpy.run_path(str(file), run_name="__main__")
    else:
        assert program in OTHERS, f"{program}: a command that no test reads, and no reason why not"


def test_every_command_is_read_to_its_end(commands, folder, monkeypatch):
    def parse(parser, *arguments, **named):
        original(parser, *arguments, **named)
        raise Read

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(cli, "run", read)
    monkeypatch.setattr(runs, "config_of", lambda *folders: mamba.get_config())  # of weights that are not there
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(folder)
    assert len(commands) > 100
    wrong = []
    for arguments, page in commands.items():
        if "ema" in re.split(r"\W", " ".join(arguments)):
            continue  # tests/test_docs.py runs it, after the page has made the file
        if arguments[2:] and arguments[2].endswith(".gguf"):
            continue  # the flags are those of the file, which has to be downloaded
        try:
            check(list(arguments), folder)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            wrong.append(f"{page}: {' '.join(arguments)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --config=configs/mamba.py --config.no_such=3",
        "python train.py --config=configs/nowhere.py",
        "python eval.py --workdir=runs/x --tokens=3",
        "python sweep.py --config=configs/mamba.py --grid model.nothing=3,4",
        "make nothing",
        "conda install jax",
    ],
)
def test_a_wrong_command_is_found(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (arguments,) = shell(command, folder)
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        check(arguments, folder)
    assert not isinstance(caught.value, Read)


# Run one after another in one folder, each as on the page that has it, at the size of a toy.
STORY = """
python train.py --config=configs/mamba.py --workdir=runs/mamba
python train.py --config=configs/mamba.py --config.data.path=books --config.data.streaming=True --workdir=runs/streamed
python convert.py --workdir=runs/mamba --export=Llama-3.2-1B
python convert.py --from=Llama-3.2-1B --workdir=runs/llama
python train.py --config=runs/llama/config.json --config.training.start=runs/llama --workdir=runs/tuned
python train.py --config=configs/densemamba.py --workdir=runs/densemamba
python eval.py --workdir=runs/densemamba --prompt="To be" --top_p=0.9
python eval.py --workdir=runs/densemamba
"""
TOY = [
    *("--config.model.width=32", "--config.model.repeats=2"),
    *("--config.seq_len=16", "--config.batch_size=2", "--config.sample.tokens=0"),
    *("--config.metrics.tensorboard=False", "--config.evaluation.batch_size=128"),
    *("--config.data.name=text", "--config.data.path=books", "--config.mesh.data=1"),
]
ROWS = TOY[2:]  # for weights from elsewhere, whose sizes are given
# unless the page says something else
SHORT = {"train": ["--config.steps=2"], "eval": ["--limit=2", "--evals=perplexity"], "prompt": ["--tokens=3"]}


@pytest.mark.slow
def test_commands_run(commands, tmp_path, monkeypatch, capfd):
    """In this process: other tests start the commands in processes of their own."""
    (tmp_path / "books").mkdir()
    write_text(tmp_path / "books")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    fails = [line.partition("  # ")[0] for line in (ROOT / "docs" / "debugging.md").read_text().splitlines()
             if line.endswith("  # fails")]  # fmt: skip
    page = [
        list(arguments)
        for arguments, page in commands.items()
        if page == Path("docs/debugging.md") and arguments[1] == "train.py"
    ]
    story = shell(STORY, tmp_path)
    assert len(page) == 5 and len(fails) == 1
    for arguments in (*story, *page):
        on_a_page = [word if word != "--export=Llama-3.2-1B" else "--export=DIR" for word in arguments]
        assert tuple(on_a_page) in commands, " ".join(arguments)
        name = arguments[1].removesuffix(".py")
        given = {word.split("=")[0] for word in arguments}
        short = [
            word for word in SHORT.get("prompt" if "--prompt" in given else name, []) if word.split("=")[0] not in given
        ]
        toy = {"train": ROWS if "runs/llama" in arguments[2] else TOY}.get(name, [])
        typed = [f"{name}.py", *toy, *short, *arguments[2:]]
        expected = int(shell(fails[0].strip(), tmp_path) == [arguments])
        assert cli.run(SCRIPTS[name].main, SCRIPTS[name].define, "", typed) == expected, capfd.readouterr().err
    assert list((tmp_path / "runs/profiled/profile").rglob("*.xplane.pb"))
    assert json.loads((tmp_path / "runs/densemamba/eval.json").read_text())["limit"] == 2
    assert "To be" in capfd.readouterr().out
