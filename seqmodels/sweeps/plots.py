"""Pictures of a sweep, one axes each, as PNG and SVG. A trial has one colour and number in all pictures and tables.

Trials that differ only in the learning rate have one colour; then lines and marks tell the rates apart.
"""

import io
from typing import Any

from seqmodels.sweeps.markup import Picture
from seqmodels.sweeps.results import Group

NAMES = (  # of all pictures that a report may have; the last two are those of earlier versions
    *("losses", "losses_by_time", "loss_differences", "metric", "differences", "parameters", "state", "speed"),
    *("bars", "quality"),
)
WIDTH, HEIGHT = 5.6, 3.7  # inches of a picture, without its legend
LINE = 0.17  # inches of a line of the legend
LARGEST = 2**15  # pixels of a side
SMALL = 8  # points of the numbers in a picture
# Where curves lie on each other, the lower one is seen through the gaps of the upper one.
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2.5)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
# The same with other gaps: when all were used once, and for every second colour where a line stands for a rate.
GAPS: tuple[Any, ...] = ((0, (11, 1.5)), (2, (5, 4)), (1, (1.5, 2.5)), (3, (7, 3, 1.5, 3)))
MARKS = "os^Dv<>P"
KEYS = 40  # entries of a legend
FEW = 10  # colours that are easy to tell apart


def pictures(groups: list[Group], metric: str) -> list[Picture]:
    """All pictures for which there are values."""
    from seqmodels.sweeps import curves, marks

    found = (*curves.figures(groups), *marks.figures(groups, metric))
    return [Picture(name, about, _saved(figure, "png"), _saved(figure, "svg")) for name, about, figure in found]


class Style:
    """Colour, line and mark of each group, and the legend that explains them."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.models = list(dict.fromkeys(group.model for group in groups))
        self.rates = sorted({group.rate for group in groups if group.rate is not None})
        self.by_rate = len(self.models) < len(groups)

    def colour(self, group: Group) -> tuple:
        import matplotlib

        place = self.models.index(group.model)
        if len(self.models) <= FEW:
            return matplotlib.colormaps["tab10"](place)
        return matplotlib.colormaps["tab20"]((2 * place + place // FEW) % 20)

    def dash(self, group: Group) -> Any:
        place = self._place(group)
        second = self.models.index(group.model) % 2 if self.by_rate else place // len(DASHES) % 2
        return (GAPS if second else DASHES)[place % len(DASHES)]

    def mark(self, group: Group) -> str:
        return MARKS[self._place(group) % len(MARKS)]

    def _place(self, group: Group) -> int:
        if not self.by_rate:
            return self.models.index(group.model)
        return 0 if group.rate is None else self.rates.index(group.rate)

    def legend(self, figure: Any, marks: bool = False) -> None:
        """Puts a legend below the axes, and makes the figure as much higher."""
        from matplotlib.lines import Line2D

        def key(text: str, colour: Any, group: Group) -> Line2D:
            line = dict(linestyle="none", marker=self.mark(group)) if marks else dict(linestyle=self.dash(group))
            return Line2D([], [], color=colour, label=shortened(text), **line)

        if self.by_rate:
            first = {model: next(group for group in self.groups if group.model == model) for model in self.models}
            of_rate = {rate: next(group for group in self.groups if group.rate == rate) for rate in self.rates}
            keys = [Line2D([], [], color=self.colour(group), linewidth=4, label=shortened(model))
                    for model, group in first.items()]  # fmt: skip
            keys += [key(f"learning rate {rate:.4g}", "0.4", group) for rate, group in of_rate.items()]
        else:
            keys = [key(name_of(group), self.colour(group), group) for group in self.groups]
        keys = keys[:KEYS]  # of hundreds of trials nobody tells the colours apart
        longest = max(len(str(each.get_label())) for each in keys)
        columns = min(3 if longest <= 20 else 2 if longest <= 36 else 1, len(keys))
        rows = -(-len(keys) // columns)
        figure.set_figheight(figure.get_figheight() + LINE * rows + 0.15)
        figure.legend(
            handles=keys, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False,
            handlelength=2.6, labelspacing=0.3, columnspacing=1.2,
        )  # fmt: skip


def new_figure(height: float = HEIGHT, **labels: str) -> tuple[Any, Any]:
    """A figure with one axes, which has these labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(**labels)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def name_of(group: Group) -> str:
    return f"{group.number}  {group.label}"


def shortened(text: str, most: int = 72) -> str:
    """A text without its middle, if it is longer: ends of labels differ as much as beginnings."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _saved(figure: Any, kind: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    dpi = min(170, LARGEST / max(figure.get_size_inches()))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "seqmodels"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
