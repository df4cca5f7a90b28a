"""Tables and pictures of what came out of a sweep."""

import csv
import importlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

from seqmodels import cli
from seqmodels.errors import UserError
from seqmodels.scripts import sweep
from seqmodels.sweeps import curves, definition, marks, markup, placing, plots, report, results, tables
from seqmodels.sweeps.labels import labels
from seqmodels.sweeps.spread import mean_and_spread
from tests.sweep_fakes import DENSEMAMBA, ROOT, Fakes, define

# Results


def run_directory(folder, *, seed=0, loss=2.0, speed=100.0, steps=10, curve=None, done=True, width=8):
    """As train.py and eval.py make it."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "batch_size": 4, "seq_len": 5, "model": {"width": width}}
    (folder / "config.json").write_text(json.dumps(config))
    losses = curve or [loss + 1 / (step + 1) for step in range(steps)]
    rows = [{"step": i + 1, "loss": value, "tokens_per_second": speed} for i, value in enumerate(losses)]
    rows.insert(5, {"step": 5, "validation_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "lo')
    if done:
        summary = {"steps": steps, "splits": {"validation": {"loss": loss}}, "parameters": 10 * width, "sample": "x"}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "eval.json").write_text(json.dumps({"step": steps, "a": {"b": [1, 2], "c": loss / 2}, "bad": None}))
    return folder


def test_figures_of_a_run(tmp_path):
    (result,) = results.of_runs([run_directory(tmp_path / "run", speed=50.0)])
    assert result.status == "done" and result.id == result.label == "run"
    figures = result.figures
    assert figures["validation.loss"] == 2.0 and figures["eval.a.c"] == 1.0 and figures["parameters"] == 80
    assert figures["steps_done"] == 10 and figures["train_loss"] == 2.0 + 1 / 10  # a twentieth of 10 rows is one
    assert figures["tokens_per_second"] == 50.0
    assert math.isclose(figures["train_seconds"], 10 * 20 / 50)  # 10 steps of 4 x 5 tokens
    assert set(figures) == {
        "steps_done", "train_loss", "tokens_per_second", "train_seconds", "validation.loss", "parameters",
        "eval.step", "eval.a.c",
    }  # fmt: skip


def test_loss_at_equal_time(tmp_path):
    fast = run_directory(tmp_path / "fast", speed=100.0, curve=[5.0, 4.0, 3.0, 2.0], steps=4)
    slow = run_directory(tmp_path / "slow", speed=50.0, curve=[4.0, 3.0, 2.0, 1.0], steps=4)
    lined = results.of_runs([fast, slow])
    assert math.isclose(results.at_equal_time(lined), 0.8)
    assert [result.figures[results.EQUAL_TIME] for result in lined] == [2.0, 3.0]


def test_a_shared_device_gives_no_speed_and_its_trials_the_time_of_their_like(tmp_path):
    shared, measured, alone, other = (
        run_directory(tmp_path / "trials" / name, seed=seed, speed=speed, steps=4)
        for name, seed, speed in (("a", 0, 7.0), ("b", 1, 7.0), ("c", 2, 80.0), ("d", 0, 7.0))
    )
    (measured / "eval.json").write_text(json.dumps({"training": {"tokens_per_second": 100.0}}))
    for folder, label in ((shared, "x"), (measured, "x"), (alone, "x"), (other, "y")):
        record = {"status": "done", "sharing": 1 if folder is alone else 2, "overrides": {"name": label}}
        (folder / "trial.json").write_text(json.dumps(record))
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": ["a", "b", "c", "d"]}))
    a, b, c, d = results.of_runs([tmp_path])
    assert [r.figures.get("tokens_per_second") for r in (a, b, c, d)] == [None, 100.0, 80.0, None]
    for result, speed in ((a, 90), (b, 90), (c, 80)):  # 20 tokens a step; 90 is the median of 100 and 80
        np.testing.assert_allclose(result.seconds, [20 * step / speed for step in (1, 2, 3, 4)])
        assert math.isclose(result.figures["train_seconds"], 80 / speed)
    assert d.seconds == [] and "train_seconds" not in d.figures
    groups = results.group([a, b, c, d])
    assert results.at_equal_time([a, b, c, d])
    assert [name for name, _, _ in curves.figures(groups)] == ["losses", "losses_by_time", "loss_differences"]
    assert results.EQUAL_TIME in a.figures and results.EQUAL_TIME not in d.figures
    (shared / "metrics.jsonl").unlink()  # lost, so that nothing says how far it was trained
    lost, *_ = results.of_runs([tmp_path])
    assert lost.status == "done" and lost.seconds == [] and "train_seconds" not in lost.figures


def test_unfinished_runs_have_no_figures_to_be_mistaken_for_results(tmp_path):
    (result,) = results.of_runs([run_directory(tmp_path / "run", done=False)])
    assert result.status == "interrupted" and result.figures == {"steps_done": 10} and len(result.losses) == 10


def test_mean_spread_and_paired_differences_against_numpy(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(3, 0.1, (2, 4))
    lined = []
    for row, name in zip(values, ("one", "two"), strict=True):
        for seed, loss in enumerate(row):
            (result,) = results.of_runs([run_directory(tmp_path / f"{name}{seed}", seed=seed, loss=loss)])
            result.label = name
            lined.append(result)
    one, two = results.group(lined)
    assert (one.number, two.number, one.label, two.label) == (1, 2, "one", "two")
    np.testing.assert_allclose(
        mean_and_spread(one.values("validation.loss")), (values[0].mean(), values[0].std(ddof=1))
    )
    np.testing.assert_allclose(two.differences(one, "validation.loss"), values[1] - values[0])
    two.results.pop(0)  # only seeds that both have
    np.testing.assert_allclose(two.differences(one, "validation.loss"), values[1, 1:] - values[0, 1:])
    assert mean_and_spread([2.0]) == (2.0, None) and math.isnan(mean_and_spread([])[0])


def test_compare_lines_up_runs_and_sweeps(tmp_path, monkeypatch, capsys):
    fakes = Fakes(tmp_path, ("fine", "better"))
    fakes.run("--seeds=2")
    run_directory(tmp_path / "other", loss=2.5)
    run_directory(tmp_path / "going", done=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "pictures", lambda *_: [])
    argv = ["sweep.py", "--compare=other,out,going", "--out=lined"]
    assert cli.run(sweep.main, sweep.define, "", argv) == 0
    table = capsys.readouterr().out
    with open("lined/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done"] * 5 + ["interrupted"]
    assert [row["validation.loss"] for row in rows] == ["2.5", "4.0", "4.125", "6.0", "6.125", ""]
    for name in ("other", "out: prompt=fine", "out: prompt=better", "going"):
        assert name in table
    again = ["sweep.py", "--compare=other,out", "--out=again", "--metric=validation.los"]
    assert cli.run(sweep.main, sweep.define, "", again) == 1
    assert "--metric=validation.los: no such figure; did you mean validation.loss" in capsys.readouterr().err
    assert (tmp_path / "again" / "results.csv").exists()  # where the names are to be found
    assert cli.run(sweep.main, sweep.define, "", argv[:2]) == 1
    assert "--out is missing" in capsys.readouterr().err


def test_a_sweep_says_what_is_hardly_meant_once(tmp_path, capsys):
    define(tmp_path, "pair", spec=DENSEMAMBA, **{"optimizer.warmup": 5000.0})
    error = capsys.readouterr().err
    assert error.count("warning: config.optimizer.warmup=5000.0 of steps=1000") == error.count("\n") == 1
    with pytest.raises(UserError, match=r"model\.dense\.variant='read': must be 'none'"):
        define(tmp_path, "pair", spec=DENSEMAMBA, **{"model.repeats": 1})
    (tmp_path / "sweep.json").write_text("{}")  # begun under an earlier version
    assert len(define(tmp_path, "pair", spec=DENSEMAMBA, **{"model.repeats": 1})) == 2
    assert "warning: config.model.dense.variant" in capsys.readouterr().err


def compared(tmp_path, *folders):
    """(label, number of results) of each group of the runs in these folders."""
    lined = results.distinct(results.of_runs([tmp_path / folder for folder in folders]))
    return [(group.label, len(group.results)) for group in results.group(lined)]


def test_different_runs_are_not_merged_as_seeds_of_one(tmp_path):
    """Kind: figures that are wrong. However it comes about: names, seeds, links, sweeps."""
    for name, options in {
        "exp1/mamba": {},
        "exp2/mamba": {"width": 16, "seed": 1},  # another config
        "seeds/1/mamba": {"seed": 1},
        "again/mamba": {},  # the same config and seed: another run, not another seed
        "texts/mamba": {"seed": 2},
    }.items():
        run_directory(tmp_path / name, **options)
    (tmp_path / "texts/mamba/data.json").write_text('{"train": "other text"}')
    assert compared(tmp_path, "exp1/mamba", "exp2/mamba") == [("exp1/mamba", 1), ("exp2/mamba", 1)]
    assert compared(tmp_path, "exp1/mamba", "seeds/1/mamba") == [("mamba", 2)]  # two seeds of one
    assert compared(tmp_path, "exp1/mamba", "exp1/mamba", "exp1/../exp1/mamba") == [("mamba", 1)]
    (tmp_path / "link").mkdir()
    (tmp_path / "link/mamba").symlink_to(tmp_path / "exp1/mamba")
    assert compared(tmp_path, "exp1/mamba", "link/mamba") == [("mamba", 1)]
    assert compared(tmp_path, "exp1/mamba", "again/mamba") == [("exp1/mamba", 1), ("again/mamba", 1)]
    assert len(compared(tmp_path, "exp1/mamba", "texts/mamba")) == 2
    three = compared(tmp_path, "exp1/mamba", "exp2/mamba", "seeds/1/mamba")
    assert three == [("exp1/mamba", 2), ("exp2/mamba", 1)]


def test_sweeps_of_one_name_are_not_merged(tmp_path):
    for place, width in (("a", 8), ("b", 16)):
        for seed in (0, 1):
            folder = run_directory(tmp_path / place / "out" / "trials" / f"t{seed}", seed=seed, width=width)
            (folder / "trial.json").write_text(json.dumps({"status": "done", "overrides": {"seed": seed}}))
        (tmp_path / place / "out" / "sweep.json").write_text(json.dumps({"trials": ["t0", "t1"]}))
    assert compared(tmp_path, "a/out", "b/out") == [("a/out: as configured", 2), ("b/out: as configured", 2)]
    # trials that were run by hand, and so left no record of what they are
    run_directory(tmp_path / "c/out/trials/t0", width=8)
    run_directory(tmp_path / "c/out/trials/t1", width=16, seed=1)
    (tmp_path / "c" / "out" / "sweep.json").write_text(json.dumps({"trials": ["t0", "t1"]}))
    found = compared(tmp_path, "c/out")
    assert [number for _, number in found] == [1, 1] and len({label for label, _ in found}) == 2


def test_a_compared_sweep_of_rates_is_one_model_of_its_name(tmp_path):
    for number in (0, 1):
        folder = run_directory(tmp_path / "gla" / "trials" / f"t{number}")
        record = {"status": "done", "overrides": {"optimizer.learning_rate": 10.0**-number, "seed": 0}}
        (folder / "trial.json").write_text(json.dumps(record))
    (tmp_path / "gla" / "sweep.json").write_text(json.dumps({"trials": ["t0", "t1"]}))
    found = results.of_runs([tmp_path / "gla"])
    assert [(result.model, result.rate) for result in found] == [("gla", 1.0), ("gla", 0.1)]


def test_labels_of_values_that_differ_far_behind_are_distinct():
    rates = [{"optimizer.learning_rate": rate, "seed": 0} for rate in (1e-3, 1.00001e-3)]
    assert labels(rates) == ["learning_rate=0.001", "learning_rate=0.00100001"]
    assert labels([rates[0], rates[0] | {"seed": 1}]) == ["learning_rate=0.001"] * 2


def test_a_run_that_is_trained_further_is_not_done(tmp_path):
    folder = run_directory(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 11, "loss": 1.0}\n')
    (result,) = results.of_runs([folder])
    assert result.status == "interrupted" and result.figures == {"steps_done": 11}
    folder = run_directory(tmp_path / "raised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steps": 20}))
    (result,) = results.of_runs([folder])
    assert result.status == "interrupted"


def test_report_has_the_means_spreads_and_differences(tmp_path):
    losses = {"none": (2.0, 2.2), "read": (1.9, 2.05)}
    lined = []
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            (result,) = results.of_runs([run_directory(tmp_path / f"{name}{seed}", seed=seed, loss=loss)])
            result.label, result.columns = name, {"variant": name, "lengths": [1, 2]}
            result.record |= {"commit": "abc", "device": "1 x <H100>", "started": "2026-01-02T03:04:05"}
            lined.append(result)
    lined += results.of_runs([run_directory(tmp_path / "rank", done=False)])
    lined[4].record |= {"status": "failed", "reason": "a | b <script>alert(1)</script>"}
    (lined[4].workdir / "trial.log").write_text("lots\nthen <b>boom</b>\n")
    report.write(tmp_path, "A & B", lined, "python sweep.py --x=<y>")

    text = (tmp_path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 1 | none"))
    half = student.interval(0.95, 1, scale=statistics.stdev(losses["none"]) / math.sqrt(2))[1]
    interval = f"[{2.1 - half:.4f}, {2.1 + half:.4f}]"
    assert f"| 2 | 2.1000 ± {statistics.stdev(losses['none']):.4f} | {interval} |  |  |" in row
    assert "| 2 | read | 2 | 1.9750 ± 0.1061 | [1.0220, 2.9280] | -0.1250 ± 0.0354 | [-0.4427, 0.1927] |" in text
    for part in ("](losses.png)", "python sweep.py --x=<y>", "Commit abc", "1 x <H100>", "2026-01-02"):
        assert part in text
    assert "a \\| b" in text and "Seeds 0, 1" in text and "4 done, 1 failed" in text

    page = (tmp_path / "report.html").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page and "then &lt;b&gt;boom&lt;/b&gt;" in page
    names = ("losses", "losses_by_time", "loss_differences", "metric", "differences", "parameters", "speed")
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|https?:|@import""", page)
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
    tex = (tmp_path / "tables.tex").read_text()
    assert tex.count(r"\begin{tabular}") == 4 == page.count("<summary>LaTeX</summary>")
    assert r"read & 2 & 1.9750 $\pm$ 0.1061 &" in tex and r"a \textbar{} b \textless{}script" in tex


def test_a_sweep_says_what_a_trial_is_compared_with(tmp_path):
    """Also in a comparison of sweep directories. The interval is that of scipy's paired t-test."""
    path = tmp_path / "config.py"
    path.write_text(
        "from configs.mamba import get_config\n"
        "def sweep(add, arg=None):\n"
        "    for width in (8, 16):\n"
        "        for state in (2, 4):\n"
        "            add({'model.width': width, 'model.mamba.state': state}, "
        "against={'model.width': width, 'model.mamba.state': 2})\n"
        "def alone(add, arg=None):\n"
        "    add({'model.width': 8}, against={'model.width': 16})\n"
        "SWEEPS = {'alone': alone}\n"
    )
    with pytest.raises(UserError, match=r"--sweep=alone: compares .*'model.width': 8.* that the sweep does not have"):
        define(tmp_path / "out", "alone", spec=str(path))
    trials = define(tmp_path / "out", spec=str(path), seeds=3)
    assert [[t.id for t in trials].index(t.against) for t in trials] == [0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8]
    definition.keep(tmp_path / "out", str(path), "ablation", trials)
    losses = np.random.default_rng(0).uniform(2, 3, (4, 3))
    for trial, loss in zip(trials, losses.flat, strict=True):
        folder = run_directory(trial.workdir, seed=trial.overrides["seed"], loss=float(loss))
        (folder / "trial.json").write_text(json.dumps({"status": "done", "evals": "", "overrides": trial.overrides}))
    for found in (results.of_trials(trials, {}), results.of_runs([tmp_path / "out"])):
        groups = results.group(results.distinct(found))
        table = tables.results(groups, "validation.loss")
        assert table.headers[5:8] == ["compared with", "difference", "95% interval"]
        low, high = ttest_rel(losses[3], losses[2]).confidence_interval()
        less = losses[3] - losses[2]
        cells = ["3", f"{less.mean():+.4f} ± {less.std(ddof=1):.4f}", f"[{low:.4f}, {high:.4f}]"]
        assert table.rows[3][5:8] == cells and table.rows[2][5:8] == ["", "", ""] and table.rows[1][5] == "1"
        assert "less that of the trial that it is compared with" in list(marks.figures(groups, "validation.loss"))[1][1]
        for each, rate in zip(groups, (1e-3, 1e-3, 1e-3, 2e-3), strict=True):
            each.results[0].model, each.results[0].rate = "plain" if each.number in (1, 3) else "form", rate
    _, table, _ = tables.best_rates(groups, "validation.loss")  # each model's best rate, against the plain one's best
    plain, form = (losses[of].mean(1).argmin() for of in ([0, 2], [1, 3]))
    low, high = ttest_rel(losses[[1, 3][form]], losses[[0, 2][plain]]).confidence_interval()
    assert table.rows[1][7] == str([1, 3][plain]) and table.rows[1][9] == f"[{low:.4f}, {high:.4f}]"


def test_report_of_nothing_yet(tmp_path):
    (result,) = results.of_runs([run_directory(tmp_path / "run", done=False)])
    result.losses.clear()
    assert result.figures  # but none to compare by
    report.write(tmp_path, "Nothing", [result], "python sweep.py", "validation.loss")
    assert not (tmp_path / "losses.png").exists() and "| 1 | run | 0 of 1 |" in (tmp_path / "report.md").read_text()


def test_pictures_show_what_there_is(tmp_path):
    """A diverged run is still a curve; without a second trial there are no differences."""
    lined = results.of_runs([run_directory(tmp_path / f"run{i}", seed=i, loss=2.0 + i) for i in range(3)])
    lined[2].record["status"], lined[2].figures = "diverged", {}
    groups = results.group(lined)
    (axes,) = dict((name, figure) for name, _, figure in curves.figures(groups))["losses"].axes
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    found = [name for name, _, _ in marks.figures(groups, "validation.loss")]
    assert found == ["metric", "parameters", "speed"]  # no seed is in two trials
    assert not list(marks.figures(groups[2:], "validation.loss"))


def test_the_best_rate_of_each_model_is_a_row(tmp_path):
    """Rates of one model have its colour; the best one is by the mean over seeds, upwards for accuracies."""
    lined = []
    for model, rate, losses in [("a", 1e-3, (3.0, 1.0)), ("a", 1e-2, (1.5, 1.7)), ("b", 1e-3, (1.2, 1.4))]:
        for seed, loss in enumerate(losses):
            (result,) = results.of_runs([run_directory(tmp_path / f"{model}{rate}{seed}", seed=seed, loss=loss)])
            result.label, result.model, result.rate = f"{model}, {rate}", model, rate
            result.figures["test.accuracy"] = 1 / loss
            lined.append(result)
    groups = results.group(lined)
    _, table, _ = tables.best_rates(groups, "validation.loss")
    assert [row[:6] for row in table.rows] == [
        ["2", "a", "0.01, the highest", "2", "2", "1.6000 ± 0.1414"],
        ["3", "b", "0.001", "1", "2", "1.3000 ± 0.1414"],
    ]
    _, table, _ = tables.best_rates(groups, "test.accuracy")
    assert table.rows[0][:3] == ["1", "a", "0.001, the lowest"]  # (1/3 + 1)/2 is more than that of 0.01
    style = plots.Style(groups)
    assert style.colour(groups[0]) == style.colour(groups[1]) != style.colour(groups[2])
    assert style.dash(groups[0]) != style.dash(groups[1])
    assert tables.best_rates(groups[1:], "validation.loss") == []


def test_labels_are_moved_apart_as_little_as_possible():
    assert np.allclose(placing.apart([0.5, 0.1, 0.9], 0.1, 0, 1), [0.5, 0.1, 0.9])
    assert np.allclose(placing.apart([0.5, 0.5, 0.5], 0.2, 0, 1), [0.3, 0.5, 0.7])
    assert np.allclose(placing.apart([1.0, 0.99, 0.0], 0.1, 0, 1), [1.0, 0.9, 0.0])
    assert np.allclose(placing.apart([0.2] * 5, 0.5, 0, 1), [0, 0.25, 0.5, 0.75, 1])  # as far as there is room
    places = np.random.default_rng(0).uniform(size=12)
    found = placing.apart(list(places), 0.05, 0, 1)
    assert np.array_equal(np.argsort(found), np.argsort(places)) and np.diff(np.sort(found)).min() > 0.05 - 1e-9


def test_numbers_stand_on_no_other_number_or_mark():
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).normal(50, 6, (18, 2))]
    offsets = placing.beside(points, [(14.0, 10.0)] * 18, 4.0)
    boxes = [(x + dx, y + dy, 14.0, 10.0) for (x, y), (dx, dy) in zip(points, offsets, strict=True)]
    dots = [(x, y, 8.0, 8.0) for x, y in points]
    assert not any(placing.overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    assert not any(placing.overlap(box, dot) for box in boxes for dot in dots)


def test_markup_in_both_forms():
    blocks = [
        markup.Heading("Two"), markup.Table(["a", "b", "c"], [["x|y", "<", "1"]]), markup.Code("```", "Log"), "Text."
    ]  # fmt: skip
    assert markup.markdown("One", blocks) == (
        "# One\n\n## Two\n\n| a | b | c |\n| --- | --- | ---: |\n| x\\|y | < | 1 |\n\nLog\n\n````\n```\n````\n\nText.\n"
    )
    page = markup.page("One", blocks)
    assert '<td class="text first">x|y</td><td class="text">&lt;</td><td>1</td>' in page
    assert markup.tabular(markup.Table(["50% \\"], [["a_b & 1 ± 2"]], texts=1)).splitlines() == [
        r"\begin{tabular}{l}", r"\toprule", r"50\% \textbackslash{} \\", r"\midrule", r"a\_b \& 1 $\pm$ 2 \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert "<details><summary>Log</summary><pre>```</pre></details>" in page


def test_sweep_imports_no_jax_and_no_plots():
    """The parent of the trials is light, and takes no device from them."""
    code = "import sys, sweep; print([m for m in ('jax', 'matplotlib', 'torch', 'submitit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["densemamba", "mamba", "transformer"])
def test_sweeps_of_all_configs_are_defined(tmp_path, name):
    spec = str(ROOT / "configs" / f"{name}.py")
    assert len(define(tmp_path, spec=spec)) > 3
    assert hasattr(importlib.import_module(f"seqmodels.configs.{name}"), "sweep")
