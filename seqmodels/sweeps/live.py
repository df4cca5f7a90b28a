"""The table that is shown while a sweep runs; where there is no terminal, a line for each change."""

import datetime
import sys
import time
from collections import Counter
from typing import Any, Self

from seqmodels.sweeps.attempt import last_row
from seqmodels.sweeps.labels import labels
from seqmodels.sweeps.trial import FINAL, Trial
from seqmodels.training.progress import clock

STYLE = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red"}
ORDER = ("running", "failed", "diverged", "preempted", "interrupted", "waiting", "done")


class Live:
    """Shows the records of trials, also of those that other processes run. A context; each call updates it."""

    def __init__(self, trials: list[Trial], slots: int) -> None:
        names = labels([trial.overrides for trial in trials])
        several = len({trial.overrides["seed"] for trial in trials}) > 1
        self._names = {
            trial.id: name + (f", seed {trial.overrides['seed']}" if several else "")
            for trial, name in zip(trials, names, strict=True)
        }
        self._trials, self._slots, self._start = trials, slots, time.monotonic()
        self._seen: dict[str, str] = {}
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live as RichLive

            self._live = RichLive(auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.__exit__(*error)

    def __call__(self) -> None:
        records = {trial.id: trial.record() for trial in self._trials}
        if self._live:
            self._live.update(self._table(records), refresh=True)
            return
        for identity, record in records.items():
            status = _status(record)
            if status != self._seen.get(identity, "waiting"):
                reason = f": {record['reason']}" if "reason" in record else ""
                print(f"{clock(time.monotonic() - self._start):>7}  {identity}  {status:<11}  {self._names[identity]}"
                      f"{reason}", flush=True)  # fmt: skip
            self._seen[identity] = status

    def _table(self, records: dict[str, dict]):
        from rich.table import Table

        table = Table(title=self._title(records), title_justify="left", box=None, pad_edge=False)
        for name in ("id", "trial", "status", "step", "loss", "tokens/s", "time", "where"):
            table.add_column(name, justify="right" if name in ("step", "loss", "tokens/s", "time") else "left")
        room = max(self._live.console.height - 6, 3)
        order = sorted(self._trials, key=lambda trial: ORDER.index(records[trial.id]["status"]))
        shown = {trial.id for trial in order[:room]}
        for trial in self._trials:
            if trial.id in shown:
                table.add_row(*self._row(trial, records[trial.id]), style=STYLE.get(records[trial.id]["status"]))
        if len(shown) < len(self._trials):
            table.add_row("", f"and {len(self._trials) - len(shown)} more")
        return table

    def _row(self, trial: Trial, record: dict) -> list[str]:
        row = last_row(trial.workdir / "metrics.jsonl") if record["status"] != "waiting" else {}
        status = _status(record) + (f" ({record['stage']})" if record["status"] == "running" else "")
        loss, speed, seconds = row.get("loss"), row.get("tokens_per_second"), record.get("seconds")
        if record["status"] == "running":
            began = datetime.datetime.fromisoformat(record["stage_started"]).timestamp()
            seconds = record["seconds"] + time.time() - began
        return [
            trial.id,
            self._names[trial.id],
            status,
            f"{row.get('step', 0)}/{trial.fields['steps']}",
            "" if loss is None else f"{loss:.4f}",
            "" if speed is None else f"{speed:,.0f}",
            "" if seconds is None else clock(seconds),
            record.get("host", ""),
        ]

    def _title(self, records: dict[str, dict]) -> str:
        counts = Counter(record["status"] for record in records.values())
        parts = [f"{counts[status]} {status}" for status in ORDER if counts[status]]
        took = [record["seconds"] for record in records.values() if record["status"] == "done" and "seconds" in record]
        left = sum(record["status"] not in FINAL for record in records.values())
        if took and left:
            parts.append(f"about {clock(sum(took) / len(took) * left / self._slots)} left")
        return ", ".join(parts)


def _status(record: dict) -> str:
    attempts = record.get("attempts", 1)
    return record["status"] + (f", attempt {attempts}" if attempts > 1 else "")
