"""Floating-point operations of a training step, counted from the model, and the peak of a device.

A multiply-add counts as two operations. The operations that the mathematics needs are counted, once for the forward
pass and twice for the backward pass. What rematerialisation repeats does not count, so that model FLOPs utilisation
(MFU: Chowdhery et al. 2022, appendix B) says which share of the device served the model.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from seqmodels import depth
from seqmodels.backbone import branch_of, connection_of, plan
from seqmodels.layers.parameter import declarations

# Dense peak in 1e12 operations a second, by the start of jax.Device.device_kind; vendors' data sheets.
# Float32 is that of the matrix units at JAX's default precision: TF32 on NVIDIA, bfloat16 passes on TPU.
PEAKS = {
    "NVIDIA H100 PCIe": {"bfloat16": 756, "float32": 378},
    "NVIDIA H100": {"bfloat16": 989, "float32": 495},
    "NVIDIA H200": {"bfloat16": 989, "float32": 495},
    "NVIDIA A100": {"bfloat16": 312, "float32": 156},
    "TPU v4": {"bfloat16": 275, "float32": 275},
    "TPU v5 lite": {"bfloat16": 197, "float32": 197},
    "TPU v5e": {"bfloat16": 197, "float32": 197},
    "TPU v5p": {"bfloat16": 459, "float32": 459},
    "TPU v5": {"bfloat16": 459, "float32": 459},
    "TPU v6 lite": {"bfloat16": 918, "float32": 918},
    "TPU v6e": {"bfloat16": 918, "float32": 918},
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations a second of one device in matmuls of this dtype, or None where it is not in the table (as on CPUs)."""
    kinds = [kind for kind in PEAKS if device_kind.startswith(kind)]
    if not kinds:
        return None
    return 1e12 * PEAKS[max(kinds, key=len)]["float32" if dtype == "float32" else "bfloat16"]


def forward_flops_per_token(boxed: Any, config: Any, length: int) -> float:
    """Operations a token of the forward pass, at rows of `length` tokens.

    A parameter that is not a vector is used in a matrix product or a depthwise convolution: two operations for each
    number. A table of the vocabulary counts only where it makes the logits, not where it is looked up. A branch or a
    connection across depth says how many more operations it has (`Branch.flops`), and a branch which of its parameters
    a token does not use (`Branch.idle_parameters`).

    Args:
        boxed: parameters, abstract or concrete, with their declarations.
        config: config.model.
    """
    total, tables = 0.0, [0.0]
    for leaf in declarations(boxed):
        products = 2.0 * math.prod(leaf.value.shape)
        if "vocab" in leaf.names:
            tables.append(products)
        elif leaf.axes >= 2:
            total += products
    # one table makes logits, tied to the look-up or not
    return total + max(tables) + sum(beyond_products(config, length).values())


def beyond_products(config: Any, length: int) -> dict[str, float]:
    """Operations a token of the forward pass beyond two for each parameter, for "branches" and across "depth"."""
    total = {"branches": 0.0, "depth": 0.0}
    for spec in plan(config):
        for word in spec.names().values():
            branch = branch_of(config, word, parent=None)
            total["branches"] += branch.flops(length) - 2.0 * branch.idle_parameters()
        total["depth"] += connection_of(config, spec, parent=None).flops()
    total["depth"] += depth.connection_of(config, [], 0, parent=None).flops()  # at the end of the model
    return total


def train_step_flops(boxed: Any, config: ConfigDict) -> float:
    """Operations of one optimizer step over the whole batch: forward, and twice that backward."""
    length = config.seq_len // (config.model.patch if config.model.input == "patches" else 1)
    return 3.0 * config.batch_size * length * forward_flops_per_token(boxed, config.model, length)
