"""Floating-point operations of a training step, counted from the model, and what a device can do.

A multiply-add counts as two operations. Counted are the operations that the mathematics needs, once forward and twice
backward; what rematerialisation does again is not, so that model FLOPs utilisation (MFU: Chowdhery et al. 2022,
appendix B) says how much of the device served the model.
"""

import math

import jax
from ml_collections import ConfigDict

from seqmodels.backbone import mixer_of, plan
from seqmodels.training.sharding import is_box

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

# Of one token, channel and state of a selective scan: dt A, (dt x) B, a h + b, and h C summed over the state.
SCAN = 1 + 1 + 2 + 2

# Of one token and element of a matrix state: k v and the sum, and q S summed over the keys. DECAY, where there is one.
MATRIX = 2 + 2
DECAY = 1

# The same for each lower state that a DenseSSM layer uses: READ scans it again and reads it; CARRY scans it, gates it
# twice and adds it; RANK writes it, as a product and a sum. INPUT and OUTPUT mix tokens, not states.
DENSE = {"none": 0, "read": SCAN, "carry": 4 + 2 + 1, "rank": 2, "input": 0, "output": 0}
DENSE_MATRIX = DENSE | {"read": MATRIX + DECAY}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations a second of one device in matmuls of this dtype, or None where it is not in the table (as on CPUs)."""
    kinds = [kind for kind in PEAKS if device_kind.startswith(kind)]
    if not kinds:
        return None
    return 1e12 * PEAKS[max(kinds, key=len)].get("float32" if dtype == "float32" else "bfloat16")


def forward_flops_per_token(boxed, seq_len: int) -> float:
    """Operations a token of the forward pass, at rows of `seq_len` tokens.

    Args:
      boxed: parameters, abstract or concrete, in the boxes that name their axes. These say what a parameter does:
        a matrix is a matmul (or a depthwise convolution); a `vocab` table is a look-up, and a matmul where it makes the
        logits; `A_log` is the transition of a selective scan; `query` is that of an attention, whose scores and
        sums over `seq_len` keys are counted in full, as they are computed, though half of them are masked.
    """
    total, tables = 0.0, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        value, axes = (leaf.value, leaf.names) if is_box(leaf) else (leaf, (None,) * leaf.ndim)
        name = [key.key for key in path][-1]
        size = math.prod(value.shape)
        if "vocab" in axes:
            tables.append(2.0 * size)
        elif sum(axis != "layers" for axis in axes) < 2:
            continue
        elif name == "A_log":
            total += SCAN * size
        else:
            total += 2.0 * size
            if name == "query":
                total += 4.0 * seq_len * size / value.shape[axes.index("embed")]
    return total + (max(tables) if tables else 0.0)  # one table makes logits, tied to the look-up or not


def train_step_flops(boxed, config: ConfigDict) -> float:
    """Operations of one optimizer step over the whole batch: forward, and twice that backward."""
    tokens = config.batch_size * config.seq_len
    states = matrix_flops_per_token(config.model) + dense_flops_per_token(config.model)
    return 3.0 * tokens * (forward_flops_per_token(boxed, config.seq_len) + states)


def matrix_flops_per_token(model: ConfigDict) -> float:
    """Operations a token of the forward pass in matrix states, as the recurrence needs them; `model` is config.model.

    Chunks of matrix products, which is how these run, do more of them, at the speed of a matmul.
    """
    total = 0.0
    for block in plan(model):
        mixer = mixer_of(model, block, parent=None)
        if hasattr(type(mixer), "state_shape"):
            total += (MATRIX + DECAY * mixer.decays) * math.prod(mixer.state_shape)
        if hasattr(type(mixer), "feature_flops"):  # products with matrices that are no parameters
            total += mixer.feature_flops
    return total


def dense_flops_per_token(model: ConfigDict) -> float:
    """Operations a token of the forward pass in the lower states that DenseSSM uses; `model` is config.model."""
    total = 0.0
    for block in plan(model):
        if block.sources:
            mixer = mixer_of(model, block, parent=None)
            matrix = hasattr(type(mixer), "state_shape")
            elements = math.prod(mixer.state_shape if matrix else mixer.stream_sizes)
            total += block.sources * (DENSE_MATRIX if matrix else DENSE)[model.dense.variant] * elements
    return total
