"""Series, tables and films: files of each kind are read as written, forms of forecasts, baselines."""

import csv
import types

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from seqmodels import evals
from seqmodels.data.domains import electricity, pendulum
from seqmodels.errors import UserError
from tests.domain_rows import load, rows

RNG = np.random.default_rng(0)


def test_series(tmp_path):
    """UCR's .tsv, whose classes may be -1 and 1, and sktime's .ts with rows of several lengths and missing values."""
    for part, count in (("TRAIN", 10), ("TEST", 3)):
        lines = [f"{-1 if n % 2 else 1}\t{n}.0\t{n + 1}.5\tNaN" for n in range(count)]
        (tmp_path / f"Tiny_{part}.tsv").write_text("\n".join(lines) + "\n")
        lines = [f"{n},2{',3' * (n % 2)}:4,5{',?' * (n % 2)}:b{n % 2}" for n in range(count)]
        (tmp_path / f"Tiny_{part}.ts").write_text("#a comment\n@timestamps false\n@data\n" + "\n".join(lines) + "\n")
    dataset = load("series", 3, tmp_path, set="Tiny", ending="tsv", validation=0.2)
    assert [split.count for split in dataset.splits.values()] == [8, 2, 3]
    test, train = rows(dataset, "test"), dataset.splits["train"]
    assert test["labels"].tolist() == [1, 0, 1] and test["mask"].sum(axis=1).tolist() == [2, 2, 2]
    real = train.inputs[:, :2]
    expected = (np.array([[0, 1.5], [1, 2.5], [2, 3.5]]) - real.mean()) / real.std()
    np.testing.assert_allclose(test["values"][:, :2, 0], expected, rtol=1e-5)
    assert set(dataset.baselines("test")) == {"logistic regression", "nearest neighbour"}
    dataset = load("series", 4, tmp_path, set="Tiny", ending="ts", validation=0.0)
    assert list(dataset.splits) == ["train", "test"] and dataset.spec["values"].shape == (4, 4, 2)
    assert rows(dataset, "test")["mask"].sum(axis=1).tolist() == [2, 3, 2]
    assert str(dataset.splits["test"].inputs[1].tolist()) == "[[1.0, 4.0], [2.0, 5.0], [3.0, nan]]"
    gaps, train = rows(load("series", 4, tmp_path, set="Tiny", ending="ts", validation=0.0, gaps=True), "test"), 0.0
    assert gaps["observed"][1].tolist() == [[True, True], [True, True], [True, False], [False, False]]
    train = np.concatenate([[[n, 4], [2, 5]] + [[3, np.nan]] * (n % 2) for n in range(10)])
    mean, deviation = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
    expected = np.nan_to_num(([[1, 4], [2, 5], [3, np.nan], [np.nan] * 2] - mean) / deviation)
    np.testing.assert_allclose(gaps["values"][1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"config.seq_len=2: must be at least 3, the longest row"):
        load("series", 2, tmp_path, set="Tiny", ending="ts")


@pytest.fixture
def table(tmp_path):
    """120 steps of two columns that are not in order, and one that is not read."""
    series = np.cumsum(RNG.normal(size=(120, 2)), axis=0)
    with (tmp_path / "load.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["b", "day", "a"])
        writer.writerows([[b, "x", a] for a, b in series])
    return tmp_path, series


def test_electricity(table):
    """Windows by hand; the first predicted value of a split is the first of its share of the time."""
    path, series = table
    fields = dict(file="load.csv", columns="a,b", lookback=6, horizon=3, season=2)
    dataset = load("electricity", 6, path, **fields)
    scaled = (series - series[:84].mean(axis=0)) / series[:84].std(axis=0)
    for split, start, end in (("train", 6, 84), ("validation", 84, 96), ("test", 96, 120)):
        found = rows(dataset, split)
        assert len(found["values"]) == end - 3 - start + 1
        for n in (0, len(found["values"]) - 1):
            np.testing.assert_allclose(found["values"][n], scaled[start + n - 6 : start + n], atol=1e-6)
            np.testing.assert_allclose(found["targets"][n], scaled[start + n : start + n + 3], atol=1e-6)
    found, simple = rows(dataset, "test"), dataset.baselines("test")
    last = np.repeat(found["values"][:, -1:], 3, axis=1)
    season = found["values"][:, [-2, -1, -2]]
    for name, guess in (("last value", last), ("a season before", season)):
        assert simple[name]["loss"] == pytest.approx(((guess - found["targets"]) ** 2).mean(), rel=1e-5)
        assert simple[name]["mae"] == pytest.approx(np.abs(guess - found["targets"]).mean(), rel=1e-5)
    train, squared = rows(dataset, "train"), 0.0
    for c in range(2):  # ridge is least squares with sqrt(strength) more rows
        x, y = (train[name][:, :, c] - train["values"][:, -1:, c] for name in ("values", "targets"))
        weights = np.linalg.lstsq(np.concatenate([x, np.eye(6)]), np.concatenate([y, np.zeros((6, 3))]))[0]
        guess = (found["values"][:, :, c] - found["values"][:, -1:, c]) @ weights + found["values"][:, -1:, c]
        squared += ((guess - found["targets"][:, :, c]) ** 2).mean() / 2
    assert simple["ridge"]["loss"] == pytest.approx(squared, rel=1e-4)
    with pytest.raises(UserError, match=r"config.data.domain.columns='c': must be among b, day, a"):
        load("electricity", 6, path, **fields | dict(columns="c"))
    with pytest.raises(UserError, match=r"config.seq_len=7: must be config.data.domain.lookback=6"):
        load("electricity", 7, path, **fields)
    assert electricity.SPLITS[-1][2] == 1.0


def test_forms_of_forecasts(table):
    """The future is masked, or is what a model of the next value is trained on; a missing value never counts."""
    path, series = table
    fields = dict(file="load.csv", columns="a,b", lookback=6, horizon=3, season=2)
    window = rows(load("electricity", 6, path, **fields), "test")
    both = np.concatenate([window["values"], window["targets"]], axis=1)
    masked = load("electricity", 9, path, **fields, form="masked")
    assert masked.objective == "regress_steps" and masked.spec["observed"].shape == (4, 9, 2)
    found = rows(masked, "test")
    np.testing.assert_array_equal(found["observed"], np.broadcast_to(np.arange(9)[:, None] < 6, both.shape))
    np.testing.assert_array_equal(found["values"], np.where(found["observed"], both, 0))
    np.testing.assert_array_equal(found["targets"], np.where(found["observed"], np.nan, both))
    assert set(masked.baselines("test")["ridge"]) == {"mse", "mae"}
    recurrent = load("electricity", 9, path, **fields, form="recurrent")
    np.testing.assert_array_equal(rows(recurrent, "test")["values"], both)
    assert recurrent.baselines("test") == {} and "targets" not in recurrent.spec
    with pytest.raises(UserError, match=r"config.seq_len=6: must be config.data.domain.lookback \+ horizon=9"):
        load("electricity", 6, path, **fields, form="masked")

    text = (path / "load.csv").read_text().splitlines()
    text[11], text[101] = ",x,", f",x,{series[100, 0]}"
    (path / "load.csv").write_text("\n".join(text))
    with pytest.raises(UserError, match=r"load.csv: a row has no number in a,b"):
        load("electricity", 6, path, **fields)
    dataset = load("electricity", 6, path, **fields, gaps=True)
    series = series.copy()
    series[10], series[100, 1] = np.nan, np.nan
    scaled = (series - np.nanmean(series[:84], axis=0)) / np.nanstd(series[:84], axis=0)
    train, test = rows(dataset, "train"), rows(dataset, "test")
    np.testing.assert_allclose(train["values"][4], np.nan_to_num(scaled[4:10]), atol=1e-6)
    np.testing.assert_array_equal(train["observed"][5, :, 0], np.arange(6) < 5)
    np.testing.assert_allclose(test["targets"][4], scaled[100:103], atol=1e-6)
    simple = dataset.baselines("test")
    guess = np.repeat(test["values"][:, -1:], 3, axis=1)
    guess[5, :, 1] = test["values"][5, -2, 1]  # the last value is missing, so it is the one before
    error = (guess - test["targets"]) ** 2
    assert np.isnan(error).sum() == 3
    assert simple["last value"]["loss"] == pytest.approx(np.nanmean(error), rel=1e-5)


def test_errors_of_predictions_that_are_fed_back(table, monkeypatch):
    """Over all windows and the steps after them, each once; beside them those of the simple forecasts."""
    path, _ = table
    fields = dict(file="load.csv", columns="a,b", lookback=6, horizon=3, season=2)
    dataset = load("electricity", 9, path, **fields, form="recurrent")
    forecast = evals.EVALUATORS["forecast"]
    monkeypatch.setattr(forecast, "feed_back", lambda model, params, values, steps, past: values[:, -1:].repeat(3, 1))
    run = types.SimpleNamespace(dataset=dataset, model=None, params=None, batch_size=4)
    assert forecast.serves(run)
    found = forecast.evaluate_run(run, ["test"], None)
    for name, error in found["forecast"]["test"]["fed back"].items():
        assert error == pytest.approx(found["forecast"]["test"]["last value"][name], rel=1e-6)
    assert "ridge" in forecast.table(found)
    assert not forecast.serves(types.SimpleNamespace(dataset=load("electricity", 6, path, **fields)))


def test_pendulum():
    """The law of motion by SciPy, the bob where the angle says, films by number, and a baseline by `lstsq`."""
    dataset = load("pendulum", 20, films=40, held=10, times=50, missing=0.3)
    (test,) = dataset["test"].batches(10)
    again = dataset.splits["test"].read(np.arange(3, 5), 20)
    for name, array in again.items():
        np.testing.assert_array_equal(test[name][3:5], array)
    assert not np.array_equal(dataset.splits["train"].read(np.arange(1), 20)["targets"], test["targets"][:1])
    np.testing.assert_allclose((test["targets"] ** 2).sum(-1), 1, rtol=1e-6)
    assert (test["steps"][:, 0] == 1).all() and (test["steps"] * 2.5 % 1 < 1e-4)[:, 1:].all()
    assert 0.1 < (~test["observed"]).mean() < 0.5 and not test["values"][~test["observed"]].any()

    class Still:  # draws the first angle, and no kicks
        def uniform(self, low, high):
            return 2.0

        def normal(self, size):
            return np.zeros(size)

    grid = np.arange(30) * pendulum.STEP * pendulum.EACH
    right = solve_ivp(lambda t, y: [y[1], -9.81 * np.sin(y[0])], (0, grid[-1]), [2.0, 0.0], t_eval=grid, rtol=1e-8)
    np.testing.assert_allclose(pendulum.angles([Still()], 30)[0], right.y[0], atol=0.05)
    angle = np.array([0.0, np.pi / 2])  # at the bottom, to the right
    down, across = (pendulum.pictures(angle).reshape(2, 24, 24).sum(axis=axis) for axis in (2, 1))
    centre = (np.arange(24) + 0.5) / 12 - 1
    for found, expected in ((down, np.cos(angle)), (across, np.sin(angle))):
        np.testing.assert_allclose(found @ centre / found.sum(axis=1), 0.75 * expected, atol=0.02)
    simple = dataset.baselines("test")
    assert set(simple) == {"ridge, one frame", "ridge, 3 frames"}
    assert simple["ridge, one frame"]["mse"] < 0.5 * 0.99  # the variance of sine and cosine
