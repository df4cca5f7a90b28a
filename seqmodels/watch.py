"""What the beats of a job's processes tell: which one is silent, where a hang is, and who keeps the others waiting.

A process says every few seconds where it is. Who judges needs no common clock: a beat carries ages, not times.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping

BEAT = 2.0  # seconds between two beats
SILENCE = 60.0  # seconds without a beat after which a process counts as dead, or stopped
HURT_SILENCE = 3 * BEAT  # the same where another process has failed, as it does if this one is dead
SAY_EVERY = 60.0  # seconds between two lines about a slow or stuck job
STRAGGLER = 0.2  # share of the time that a process waits for its own data, where no other waits half as long

# Places within a step, in this order. At other places a process may stay as long as it takes.
TIMED = ("data", "step", "validation", "checkpoint", "evaluation")


@dataclasses.dataclass(frozen=True)
class Beat:
    """Where a process is.

    Attributes:
      count: of its beats.
      step: that it works on.
      place: in the step, such as "data" (reads the batch) or "step" (waits for the devices).
      age: seconds since it came there.
      waited: seconds that it has waited for its data, in all.
    """

    count: int
    step: int
    place: str
    age: float
    waited: float

    def text(self) -> str:
        """For the key-value store."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def of(cls, text: str) -> "Beat":
        """The inverse of `text`."""
        return cls(*json.loads(text))

    def __str__(self) -> str:
        where = {"data": "the data of step", "step": "the devices in step"}.get(self.place, f"the {self.place} of step")
        return f"{where} {self.step}"


class Watch:
    """Judges the beats of all processes, as one of them hears them. Times are seconds of its own clock."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[int, float]] = {}  # the last count of each process, and when it came
        self._window: tuple[float, dict[int, float]] | None = None  # of `straggler`: its begin, and `waited` then

    def silent(self, beats: Mapping[int, Beat], now: float, patience: float) -> list[tuple[int, float]]:
        """Processes without a beat for `patience` seconds, and for how long. Those that are done may be silent."""
        for process, beat in beats.items():
            if self._heard.get(process, (-1, 0.0))[0] != beat.count:
                self._heard[process] = beat.count, now
        ages = ((process, now - when) for process, (_, when) in self._heard.items())
        return [(process, age) for process, age in ages if age > patience and beats[process].place != "done"]

    def straggler(self, beats: Mapping[int, Beat], now: float) -> str | None:
        """A line about a process that kept the others waiting in the last minute, once a minute."""
        waited = {process: beat.waited for process, beat in beats.items()}
        if self._window is None or self._window[1].keys() != waited.keys():
            self._window = now, waited
        begin, before = self._window
        if now - begin < SAY_EVERY:
            return None
        self._window = now, waited
        shares = sorted(((waited[i] - before[i]) / (now - begin), i) for i in waited)
        (most, slow), second = shares[-1], shares[-2][0] if len(shares) > 1 else 0.0
        if len(shares) < 2 or most < STRAGGLER or second > most / 2:
            return None
        return f"straggler: {{{slow}}} waited for its data {most:.0%} of the last minute, at step {beats[slow].step}"


def stuck(beats: Mapping[int, Beat], seconds: float) -> list[int]:
    """The processes that hold up a job in which nothing has moved for so many seconds; empty: something has.

    They are those that have come least far. The others wait for their part of the same step.
    """
    timed = all(beat.place in TIMED for beat in beats.values())
    if not beats or not timed or min(beat.age for beat in beats.values()) < seconds:
        return []
    reached = {process: (beat.step, TIMED.index(beat.place)) for process, beat in beats.items()}
    return [process for process, place in reached.items() if place == min(reached.values())]


def hang_line(beats: Mapping[int, Beat], culprits: Iterable[int]) -> str:
    """Who is stuck where, and what the others do; `{i}` stands for the name of process i."""
    names = list(culprits)
    age, at = min(beat.age for beat in beats.values()), beats[names[0]]
    line = f"hang: nothing has moved for {age:.0f} s: "
    if len(names) == len(beats):
        return line + (f"{{{names[0]}}} waits for {at}" if len(beats) == 1 else f"all processes wait for {at}")
    others = next(beat for process, beat in beats.items() if process not in names)
    shown = ", ".join(f"{{{i}}}" for i in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{line}{shown} at {at}, while the others wait for {others}"
