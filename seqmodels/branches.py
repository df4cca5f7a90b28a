"""Every branch by name: what stands between two sums of the residual stream, over time (mixers) or channels.

A new branch is a file, a config and a line here. Names are read without importing JAX; a class is imported when it is
asked for.
"""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqmodels.branch import Branch


class Table(MutableMapping[str, "type[Branch]"]):
    """Name to class. A value may be given as "module:Class", which is imported on first use."""

    def __init__(self, places: dict[str, "str | type[Branch]"]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> "type[Branch]":
        place = self._places[name]
        if isinstance(place, str):
            module, _, member = place.partition(":")
            place = self._places[name] = getattr(importlib.import_module(module), member)
        return place

    def place(self, name: str) -> tuple[str, str]:
        """The module and the name of a class, which is not imported for it."""
        place = self._places[name]
        if isinstance(place, str):
            module, _, member = place.partition(":")
            return module, member
        return place.__module__, place.__name__

    def __setitem__(self, name: str, branch: "str | type[Branch]") -> None:
        self._places[name] = branch

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __contains__(self, name: object) -> bool:  # the inherited one would import the class
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


BRANCHES = Table(
    {
        "attention": "seqmodels.mixers.attention:Attention",
        "cnn": "seqmodels.mixers.cnn:Cnn",
        "conba": "seqmodels.mixers.conba:Conba",
        "conba_seq": "seqmodels.mixers.conba_seq:ConbaSeq",
        "deltanet": "seqmodels.mixers.deltanet:DeltaNet",
        "gated_deltanet": "seqmodels.mixers.gated_deltanet:GatedDeltaNet",
        "gla": "seqmodels.mixers.gla:Gla",
        "gru": "seqmodels.mixers.gru:Gru",
        "h3": "seqmodels.mixers.h3:H3",
        "hgrn": "seqmodels.mixers.hgrn:Hgrn",
        "hyena": "seqmodels.mixers.hyena:Hyena",
        "linear_attention": "seqmodels.mixers.linear_attention:LinearAttention",
        "lstm": "seqmodels.mixers.lstm:Lstm",
        "mamba": "seqmodels.mixers.mamba:Mamba",
        "mamba2": "seqmodels.mixers.mamba2:Mamba2",
        "mamba3": "seqmodels.mixers.mamba3:Mamba3",
        "mingru": "seqmodels.mixers.mingru:MinGru",
        "minlstm": "seqmodels.mixers.minlstm:MinLstm",
        "mlp": "seqmodels.channels.mlp:Mlp",
        "moe": "seqmodels.channels.moe:Moe",
        "performer": "seqmodels.mixers.performer:Performer",
        "retnet": "seqmodels.mixers.retnet:RetNet",
        "rglru": "seqmodels.mixers.rglru:RgLru",
        "rwkv": "seqmodels.mixers.rwkv:Rwkv",
        "rwkv_channel": "seqmodels.channels.rwkv_channel:RwkvChannel",
        "s4": "seqmodels.mixers.s4:S4",
        "s4d": "seqmodels.mixers.s4d:S4d",
        "s5": "seqmodels.mixers.s5:S5",
    }
)
