"""Connections across depth beside the residual stream: docs/architecture.md says what one may do."""

from typing import Any

from seqmodels.branch import Branch
from seqmodels.depth.connection import Carry, Connection
from seqmodels.depth.dense import Dense
from seqmodels.mixers.linked import Linked

__all__ = ["Carry", "Connection", "Dense", "connection_of", "kind"]

PLAIN, DENSE = "plain", "dense"


def kind(config: Any) -> str:
    """Name of the model's connection. The module has the same name in the tree of parameters."""
    return PLAIN if config.dense.variant == "none" else DENSE


def connection_of(config: Any, branches: list[Branch], sources: int, **parent: Any) -> Connection:
    """The connection of one block.

    Args:
        config: config.model.
        branches: the block's branches, in order. DenseSSM links the first that has a stream.
        sources: how many streams below it reads.
    """
    if kind(config) == PLAIN:
        return Connection(**parent)
    linked = next((branch for branch in branches if isinstance(branch, Linked)), None)
    if linked is None:
        fields: dict[str, Any] = dict(link="", sizes={}, dtype=config.dtype, implementation={})
    else:
        inner, state = linked.stream_sizes
        sizes = dict(inner=inner, state=state)
        if linked.link == "matrix":
            sizes["shape"] = linked.state_shape
        fields = dict(link=linked.link, sizes=sizes, dtype=linked.dtype, implementation=linked.implementation)
    return Dense(config.dense, config.width, sources, **fields, **parent)
