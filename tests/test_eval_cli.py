"""eval.py on a run directory with known checkpoints: its tables, its JSON, its continuations, and what it refuses."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import cli
from seqmodels.configs import densemamba, transformer
from seqmodels.evals import run as run_module
from seqmodels.scripts import eval as eval_script
from seqmodels.training.run import write_config
from seqmodels.training.sharding import unbox
from tests.run_fixtures import config_for, make_run

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with checkpoints of two steps, whose parameters differ; the first has the lower validation loss."""
    tmp_path = tmp_path_factory.mktemp("eval")
    return make_run(config_for(densemamba, tmp_path), tmp_path / "run")


def call(*argv):
    return cli.run(eval_script.main, eval_script.define, eval_script.__doc__, ["eval.py", *argv])


def test_evaluation(workdir, capsys):
    assert call(f"--workdir={workdir}") == 0
    printed = capsys.readouterr().out
    figures = json.loads((workdir / "eval.json").read_text())
    run = run_module.load_run(workdir)
    assert figures["step"] == run.step == 4 and figures["name"] == "densemamba"
    for split in ("validation", "test"):
        row = figures["perplexity"][split], figures["bits_per_byte"][split], figures["xz_bits_per_byte"][split]
        assert all(f"{value:.4f}" in printed for value in row)
        assert figures["tokens"][split] == len(run.dataset[split].tokens) - 1
        np.testing.assert_allclose(figures["perplexity"][split], np.exp(figures["loss"][split]))
        # One byte a token, and the separator no byte.
        bits = figures["loss"][split] / np.log(2) * figures["tokens"][split] / figures["bytes"][split]
        np.testing.assert_allclose(figures["bits_per_byte"][split], bits)
        assert figures["loss_by_position"][split]["last"][-1] == 31
        assert set(figures["context_lengths"][split]) == {"32", "64", "2048"}
        assert figures["context_lengths"][split]["64"]["tokens"] == 4 * 16
        assert "a row needs 2,049" in figures["context_lengths"][split]["2048"]["not_served"]
    assert "not served" in printed and (workdir / "eval.png").exists()


def test_loaded_parameters_are_those_of_the_checkpoint(workdir):
    latest, first = run_module.load_run(workdir), run_module.load_run(workdir, "2")
    assert (latest.step, first.step) == (4, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a - b, 0.02, atol=1e-6), latest.params, first.params)
    assert run_module.load_run(workdir, "best").step == 2


def test_out_splits_evals_and_limit(workdir, tmp_path):
    out = tmp_path / "figures.json"
    assert (
        call(f"--workdir={workdir}", f"--out={out}", "--splits=test", "--evals=perplexity", "--limit=3", "--step=2")
        == 0
    )
    figures = json.loads(out.read_text())
    assert (figures["step"], figures["limit"], figures["tokens"]) == (2, 3, {"test": 96})
    assert "loss_by_position" not in figures


def test_evaluation_fields_take_the_place_of_the_runs(workdir, tmp_path):
    out = tmp_path / "figures.json"
    argv = (f"--workdir={workdir}", f"--out={out}", "--splits=test", "--config.evaluation.rows=2")
    sizes = ("contexts=1,", "batches=(1,)", "tokens=2", "repeats=1")
    argv += tuple(f"--config.evaluation.throughput.{size}" for size in sizes)
    assert call(*argv, "--config.evaluation.lengths=1,2", "--evals=context_lengths,throughput") == 0
    figures = json.loads(out.read_text())
    assert set(figures["context_lengths"]["test"]) == {"32", "64"}
    assert figures["context_lengths"]["test"]["64"]["tokens"] == 2 * 16
    assert figures["throughput"]["32"]["1"]["decode_tokens_per_second"] > 0


def test_runs_without_the_newer_fields(tmp_path):
    config = config_for(densemamba, tmp_path)
    config.evals = "perplexity"
    workdir = make_run(config, tmp_path / "run")
    stored = json.loads((workdir / "config.json").read_text())
    del stored["evals"], stored["evaluation"]["throughput"], stored["evaluation"]["tasks"]
    (workdir / "config.json").write_text(json.dumps(stored))
    config = run_module.load_run(workdir).config
    assert config.evals == "" and config.evaluation.tasks == "local" and config.evaluation.throughput.repeats == 3
    assert config.evaluation.lengths == (1, 2, 64) and config.evaluation.rows == 4


def test_averaged_parameters_are_taken_where_there_are_some(tmp_path):
    config = config_for(densemamba, tmp_path)
    config.optimizer.ema = 0.9
    run = run_module.load_run(make_run(config, tmp_path / "run"))
    fresh = jax.jit(run.model.init)(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    # make_run moved the parameters, and not their average
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.params, unbox(fresh))


def test_continuation(workdir, capsys):
    argv = f"--workdir={workdir}", "--prompt=line 7:", "--tokens=6"

    def text(*more):
        assert call(*argv, *more) == 0
        return capsys.readouterr().out

    greedy = text("--temperature=0")
    assert greedy.startswith("line 7:") and greedy == text("--temperature=0", "--seed=5")
    assert text("--temperature=2", "--seed=1") == text("--temperature=2", "--seed=1")
    assert text("--temperature=1", "--top_k=1") == greedy


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["--workdir is missing"]),
        (["--workdir=/nonexistent/run"], ["/nonexistent/run", "no config.json"]),
        (["--workdir={}", "--step=3"], ["no checkpoint of step 3", "[2, 4]"]),
        (["--workdir={}", "--step=newest"], ["--step=newest", "latest, best or a number"]),
        (["--workdir={}", "--splits=train,dev"], ["dev", "validation"]),
        (["--workdir={}", "--evals=perplexty"], ["perplexty", "perplexity"]),
        (["--workdir={}", "--limit=0"], ["limit", "0"]),
        (["--workdir={}", "--evals=accuracy"], ["--evals=accuracy", "does not fit", "perplexity"]),
        (["--workdir={}", "--config.evaluation.length=1"], ["config.evaluation.length", "evaluation.lengths"]),
        (["--workdir={}", "--evals=throughput", "--config.evaluation.throughput.tokens=0"], ["tokens=0", "at least 1"]),
        (["--workdir={}", "--prompt=x", "--tokens=0"], ["tokens=0", "at least 1"]),
        (["--workdir={}", "--prompt=x", "--top_p=2"], ["top_p=2.0", "(0, 1]"]),
        (["--workdri={}"], ["workdri", "workdir"]),
        # Kind: fields of an evaluation, checked before anything is loaded
        (["--workdir={}", "--config.evaluation.lengths=(1.5,)"], ["config.evaluation.lengths=(1.5,)", "an integer"]),
        (["--workdir={}", "--config.evaluation.lengths=(0,)"], ["config.evaluation.lengths=(0,)", "at least 1"]),
        (["--workdir={}", "--config.evaluation.lengths=abc"], ["config.evaluation.lengths"]),
        (["--workdir={}", "--config.evaluation.rows=0"], ["config.evaluation.rows=0", "at least 1"]),
        (["--workdir={}", "--config.evaluation.rows=-3"], ["config.evaluation.rows=-3", "at least 1"]),
        (["--workdir={}", "--config.evaluation.batch_size=-2"], ["config.evaluation.batch_size=-2", "at least 0"]),
        (["--workdir={}", "--splits="], ["--splits=", "one or more names"]),
        (["--workdir={}", "--tasks=cloze", "--evals=perplexity"], ["--tasks=cloze", "--evals=lm_eval"]),
        (["--workdir={}", "--evals=perplexity,"], ["--evals=perplexity,", "one or more names"]),
        (["--workdir={}", "--out=/dev/null/x.json"], ["--out=/dev/null/x.json"]),
        (["--workdir={}", "--prompt=x", "--seed=18446744073709551616"], ["seed", "9223372036854775807"]),
        (["--workdir={}", "--prompt=caf\udce9"], ["--prompt", "UTF-8"]),
        (["--workdir={}", "--temperature=0.5"], ["--temperature=0.5", "--prompt"]),
        (["--workdir={}", "--prompt=x", "--limit=3"], ["--limit=3", "--prompt"]),
        (["--workdir={}", "--config.data.nme=x"], ["config.data.nme", "data.name"]),
        (["--workdir=README.md"], ["README.md"]),
    ],
)
def test_mistakes_are_one_line(workdir, capsys, argv, words):
    assert call(*(argument.format(workdir) for argument in argv)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_prompt_longer_than_a_transformers_context(tmp_path, capsys):
    config = config_for(transformer, tmp_path)
    config.model.mlp.hidden = 32
    workdir = make_run(config, tmp_path / "run")
    assert call(f"--workdir={workdir}", f"--prompt={'x' * 40}", "--tokens=8") == 1
    error = capsys.readouterr().err
    assert "prompt of 41 tokens" in error and "context of 32" in error and error.count("\n") == 1


def test_best_needs_a_run_that_keeps_it(tmp_path, capsys):
    config = config_for(densemamba, tmp_path)
    config.checkpoint.best = ""
    write_config(tmp_path / "run", config)
    assert call(f"--workdir={tmp_path / 'run'}", "--step=best") == 1
    assert "without config.checkpoint.best" in capsys.readouterr().err


def test_as_a_command(workdir):
    done = subprocess.run(
        [sys.executable, "eval.py", f"--workdir={workdir}", "--prompt=line", "--tokens=2", "--temperature=0"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("line")
    assert subprocess.run([sys.executable, "eval.py"], cwd=ROOT, capture_output=True).returncode == 1
