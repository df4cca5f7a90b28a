"""Mixtures of experts of transformers: fields, names and layouts that Jamba and Mixtral share.

In files each expert has tensors of its own. The models of transformers 5 hold all experts of a layer in two tensors,
under other names; `per_expert` gives those the names of files.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.fields.moe import MOE
from seqmodels.interop.generic import TRAINING
from seqmodels.interop.table import Table, check_export, harmless, honoured, only, refuse
from seqmodels.interop.weights import Weight, find, turned

EXPORTED: Table = {
    **honoured("experts", "top_k", "hidden"),
    "scale": only(1.0),
    "shared": only(0),
    **harmless("read with shared experts", "shared_gate"),
    **harmless(TRAINING, "balance", "z_loss", "bias_rate", "capacity"),
}
ROUTING: Table = {
    "hidden_act": only("silu", "swish"),  # our experts have SwiGLU
    **harmless("what a call returns beside the logits", "output_router_logits"),
    **harmless(TRAINING, "router_aux_loss_coef", "router_jitter_noise"),
}


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a layer's experts in a file, behind the prefix of the layer.

    Attributes:
        router: name of the router's matrix.
        gate, up, down: names of an expert's matrices, behind `experts.<number>.`.
    """

    prefix: str
    router: str
    gate: str
    up: str
    down: str


def weights(model: Mapping[str, Any], names: Names, theirs: str, ours: tuple[str, ...]) -> list[Weight]:
    """Every tensor of a layer's experts, from the prefix of their layer to the path of our branch."""
    D, X, F = model["width"], model["moe"]["experts"], model["moe"]["hidden"]
    theirs = f"{theirs}{names.prefix}"
    found = [turned(f"{theirs}{names.router}.weight", (X, D), (*ours, "router"), (D, X))]
    every, gate_up = slice(None), ((*ours, "gate_up"), (X, D, 2, F))
    for j in range(X):
        expert = f"{theirs}experts.{j}."
        found += [
            dataclasses.replace(turned(f"{expert}{names.gate}.weight", (F, D), *gate_up), slot=(j, every, 0)),
            dataclasses.replace(turned(f"{expert}{names.up}.weight", (F, D), *gate_up), slot=(j, every, 1)),
            dataclasses.replace(turned(f"{expert}{names.down}.weight", (D, F), (*ours, "down"), (X, F, D)), slot=(j,)),
        ]
    return found


def per_expert(tensors: Mapping[str, np.ndarray], names: Names, fused: str) -> dict[str, np.ndarray]:
    """The tensors under the names of files, where a layer's experts are in two tensors or the prefix is that in memory.

    Args:
        fused: prefix of the experts in memory, such as "mlp.".
    """
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(rf"(.*\.\d+\.){re.escape(fused)}(.+)", name)):
            found[name] = tensor
            continue
        layer, rest = match[1] + names.prefix, match[2]
        if rest == "experts.gate_up_proj" and tensor.ndim == 3:
            half = tensor.shape[1] // 2
            for j, expert in enumerate(tensor):
                found[f"{layer}experts.{j}.{names.gate}.weight"] = expert[:half]
                found[f"{layer}experts.{j}.{names.up}.weight"] = expert[half:]
        elif rest == "experts.down_proj" and tensor.ndim == 3:
            found |= {f"{layer}experts.{j}.{names.down}.weight": expert for j, expert in enumerate(tensor)}
        else:
            found[f"{layer}{rest}"] = tensor
    return found


def check_top_k(theirs: Mapping[str, Any], experts: str) -> None:
    """Raise a UserError for more experts a token than there are. `experts`: name of the field with their number."""
    if theirs["num_experts_per_tok"] > theirs[experts]:
        refuse("num_experts_per_tok", theirs["num_experts_per_tok"], f"allowed: at most {experts}={theirs[experts]}")


def sized(model: Mapping[str, Any], params: Mapping[str, Any], block: str, table: Table) -> dict[str, Any]:
    """The options of our experts with every default filled in; the inner width comes from the parameters of `block`."""
    options = MOE.complete(model.get("moe", {}))
    check_export(options, table, MOE.home)
    experts, _, _, hidden = np.shape(find(params, (block, "mlp", "gate_up")))
    return {**options, "experts": experts, "hidden": hidden}
