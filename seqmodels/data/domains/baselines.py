"""Simple methods that a sequence model has to beat. Each is fitted on the train split and measured on another one."""

from collections.abc import Callable
from typing import Any

import numpy as np


def logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Classes [m] of test rows by multinomial logistic regression with an L2 penalty, on standardised features.

    Minimises the sum of -log p(label) + strength / 2 |W|^2 by L-BFGS, as scikit-learn does with C = 1 / strength.

    Args:
        train: [n, F]. labels: [n] from 0. test: [m, F].
    """
    from scipy.optimize import minimize

    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation = np.where(deviation > 1e-8, deviation, 1.0)
    x, y = (train - mean) / deviation, np.eye(labels.max() + 1)[labels]
    features, count = x.shape[1], y.shape[1]

    def objective(flat):
        weights, bias = flat[: features * count].reshape(features, count), flat[features * count :]
        scores = x @ weights + bias
        scores -= scores.max(axis=1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        slope = np.exp(log_p) - y
        gradient = np.concatenate([(x.T @ slope + strength * weights).ravel(), slope.sum(axis=0)])
        return -(log_p * y).sum() + strength / 2 * (weights**2).sum(), gradient

    found = minimize(objective, np.zeros((features + 1) * count), jac=True, method="L-BFGS-B",
                     options=dict(maxiter=200)).x  # fmt: skip
    scores = (test - mean) / deviation @ found[: features * count].reshape(features, count) + found[features * count :]
    return scores.argmax(axis=1)


def nearest(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classes [m] of test rows [m, F]: those of their nearest neighbours among train rows [n, F], by Euclid."""
    distance = (train**2).sum(axis=1) - 2 * test @ train.T
    return labels[distance.argmin(axis=1)]


def ridge(train: np.ndarray, targets: np.ndarray, test: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Predictions [m, R] of ridge regression from test rows [m, F]; train [n, F], targets [n, R]; no constant."""
    gram = train.T @ train + strength * np.eye(train.shape[1])
    return test @ np.linalg.solve(gram, train.T @ targets)


def accuracies(
    train: Any, test: Any, *, features: Callable[[Any], np.ndarray] = lambda rows: rows.flat()
) -> dict[str, dict[str, float]]:
    """Accuracy of logistic regression and of the nearest neighbour, of `Labelled` rows."""
    x, y = features(train), features(test)
    return {
        name: {"accuracy": float((method(x, train.labels, y) == test.labels).mean())}
        for name, method in (("logistic regression", logistic), ("nearest neighbour", nearest))
    }
