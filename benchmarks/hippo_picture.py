"""Draw what HiPPO's states remember of a signal, at several times: python benchmarks/hippo_picture.py

The signal is read sample by sample. The state of N numbers is the only thing kept. LegT remembers the last second, LegS
everything so far. The picture is docs/results/hippo.png; the printed numbers are in docs/state_spaces.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.polynomial import legendre

from seqmodels.layers import hippo

PLACE = Path(__file__).resolve().parents[1] / "docs" / "results" / "hippo.png"
STATES, RATE, SECONDS, FASTEST = 32, 2000, 3, 6  # N, samples a second, length, Hz
TIMES = (1.0, 2.0, 3.0)


def signal() -> np.ndarray:
    """A sum of waves of random phases up to FASTEST Hz, [RATE SECONDS]."""
    draw, t = np.random.default_rng(3), np.arange(RATE * SECONDS) / RATE
    hertz = np.linspace(0.3, FASTEST, 12)
    waves = np.sin(2 * np.pi * (hertz * t[:, None] + draw.uniform(size=12))) * draw.normal(size=12)
    return waves.sum(1) / np.sqrt(12)


def read(measure: str, u: np.ndarray) -> np.ndarray:
    """The state after every sample, [samples, N], by the bilinear rule; the input is the mean of neighbours."""
    a, b = hippo.hippo(measure, STATES)
    x, unit, states, before = np.zeros(STATES), np.eye(STATES), [], u[0]
    for k, sample in enumerate(u):
        step = 1 / (k + 1) if measure == "legs" else 1 / RATE
        x = np.linalg.solve(unit - step / 2 * a, (unit + step / 2 * a) @ x + step * b * (before + sample) / 2)
        states.append(x)
        before = sample
    return np.stack(states)


def reconstructed(x: np.ndarray, points: int) -> np.ndarray:
    """The signal that the state [N] stands for, from the oldest point of its window to the newest: [points]."""
    z = np.linspace(-1, 1, points)
    return legendre.legvander(z, STATES - 1) @ (np.sqrt(2 * np.arange(STATES) + 1) * x)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    u = signal()
    t = np.arange(len(u)) / RATE
    figure, axes = pyplot.subplots(len(TIMES), 2, figsize=(10, 5.5), sharex=True, sharey=True)
    for column, (measure, title) in enumerate((("legt", "LegT: the last second"), ("legs", "LegS: everything so far"))):
        states = read(measure, u)
        for row, time in enumerate(TIMES):
            last = round(time * RATE) - 1
            first = 0 if measure == "legs" else last + 1 - RATE
            window = slice(first, last + 1)
            again, axis = reconstructed(states[last], last + 1 - first), axes[row, column]
            error = np.sqrt(np.mean((again - u[window]) ** 2) / np.mean(u[window] ** 2))
            axis.plot(t[: last + 1], u[: last + 1], color="0.75", linewidth=3, label="signal")
            axis.plot(t[window], again, color="C0", linewidth=1.2, label=f"from the state, N = {STATES}")
            axis.axvline(time, color="0.4", linewidth=0.8)
            axis.set_title(f"{title}, at {time:.0f} s" if row == 0 else f"at {time:.0f} s", fontsize=9)
            print(f"{measure} at {time:.0f} s: relative error {error:.3f}")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    axes[0, 0].set_xlim(0, SECONDS)
    axes[0, 0].set_ylim(1.4 * u.min(), 1.4 * u.max())
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(PLACE, dpi=80)


if __name__ == "__main__":
    main()
