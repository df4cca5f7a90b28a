"""Places of labels in a picture, so that they do not overlap."""

import math
from collections.abc import Sequence

Point = tuple[float, float]
DIRECTIONS = 8


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places on a line, moved as little as possible (in the sum of squares) until they are `gap` apart.

    All are within low and high. Where they do not fit, the gap is smaller.
    """
    if not places:
        return []
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    # With the gaps taken out, the places must only not decrease: pool neighbours that do to their mean.
    blocks: list[tuple[float, int]] = []  # mean and number of pooled places
    for rank, i in enumerate(order):
        mean, count = places[i] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    most = high - gap * (len(places) - 1)
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        found[i] = min(max(flat[rank], low), most) + rank * gap
    return found


def beside(points: Sequence[Point], sizes: Sequence[Point], mark: float) -> list[Point]:
    """Offsets of labels from their points, near each point and over no other label or mark.

    Args:
      points: in pixels.
      sizes: width and height of each label.
      mark: half the width of a point's mark.
    """
    taken = [(x, y, 2 * mark, 2 * mark) for x, y in points]
    offsets = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        box = (x, y, width, height)
        for attempt in range(40 * DIRECTIONS):
            ring, direction = divmod(attempt, DIRECTIONS)
            angle = math.pi / 4 + direction * 2 * math.pi / DIRECTIONS
            away = mark + 2 + ring * height / 2
            box = (x + math.cos(angle) * (away + width / 2), y + math.sin(angle) * (away + height / 2), width, height)
            if not any(overlap(box, other) for other in taken):
                break
        taken.append(box)
        offsets.append((box[0] - x, box[1] - y))
    return offsets


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (middle x, middle y, width, height) have a common area."""
    return (
        abs(one[0] - other[0]) * 2 < one[2] + other[2] - 1e-9 and abs(one[1] - other[1]) * 2 < one[3] + other[3] - 1e-9
    )
