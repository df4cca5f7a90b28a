"""Following a dashed curve without a trained network: the cheapest path from disc to disc, where ink is cheap.

A baseline of Pathfinder. Its accuracy shows how much of the answer the pixels tell.
"""

import functools

import numpy as np

FAINT = (0.03, 0.1, 0.3)  # a pixel with ink i in 0 to 1 costs 1 / (i + faint)
BLUR, CLOSEST = 0.022, 1 / 16  # of the filter that finds discs, and least distance of two discs, in sides of the image


def path_costs(images: np.ndarray) -> np.ndarray:
    """Logarithms of the cost of the cheapest path between the discs of each image, over their distance: [n, 3].

    Args:
        images: [n, size^2], ink from 0 to 255.
    """
    side = round(images.shape[1] ** 0.5)
    features = []
    for image in images.reshape(-1, side, side) / 255.0:
        one, other = discs_of(image)
        distance = np.hypot(*(np.array(one) - other))
        features.append([np.log(cheapest(1 / (image + faint), one, other) / distance) for faint in FAINT])
    return np.array(features)


def discs_of(image: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two places [row, column] of an image [size, size] with the most ink around them, apart from each other."""
    from scipy.ndimage import gaussian_filter

    side = len(image)
    around = gaussian_filter(np.maximum(image - 0.3, 0) + 1e-6 * image, BLUR * side)  # strokes are fainter than 0.3
    first = np.unravel_index(around.argmax(), image.shape)
    away = np.hypot(*(np.indices(image.shape) - np.array(first)[:, None, None]))
    second = np.unravel_index(np.where(away < CLOSEST * side, -1, around).argmax(), image.shape)
    return (int(first[0]), int(first[1])), (int(second[0]), int(second[1]))


def cheapest(cost: np.ndarray, start: tuple[int, int], end: tuple[int, int]) -> float:
    """Cost of the cheapest path in an image [size, size] of costs; a step to one of eight neighbours costs the mean of
    both pixels times its length."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    side = len(cost)
    one, other, length = steps(side)
    price = (cost.ravel()[one] + cost.ravel()[other]) / 2 * length
    graph = csr_array((price, (one, other)), shape=(side**2, side**2))
    found = dijkstra(graph, directed=False, indices=start[0] * side + start[1])
    return float(found[end[0] * side + end[1]])


@functools.cache
def steps(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the pixels on both sides of every step to a neighbour, once for both directions, and its length."""
    places = np.arange(side**2).reshape(side, side)
    pairs = [
        (places[:, :-1], places[:, 1:]),
        (places[:-1], places[1:]),
        (places[:-1, :-1], places[1:, 1:]),
        (places[:-1, 1:], places[1:, :-1]),
    ]
    one, other = (np.concatenate([pair[which].ravel() for pair in pairs]) for which in (0, 1))
    lengths = np.repeat([1.0, 1.0, 2**0.5, 2**0.5], [pair[0].size for pair in pairs])
    return one, other, lengths
