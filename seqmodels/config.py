"""What a config may hold, checked before anything is compiled or a device is touched."""

import math
from typing import Any

from ml_collections import ConfigDict

from seqmodels.errors import UserError

CHOICES = {
    "platform": ("", "cpu", "gpu", "tpu"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.residual_dtype": ("float32", "bfloat16", "float16"),
    "model.remat": ("none", "rescan", "mixer", "projected", "scan", "block", "dots", "streams"),
    "model.dense.variant": ("none", "read", "input", "output", "rank", "carry"),
    "model.dense.gate": ("channel", "state", "both", "none"),
    "model.dense.activation": ("silu", "sigmoid", "identity"),
    "model.dense.projection": ("identity", "linear"),
    "model.mamba.norms": ("none", "rms", "learned"),
    "model.retnet.schedule": ("octaves", "spread"),
    "model.retnet.activation": ("identity", "silu"),
    "model.linear_attention.feature_map": ("elu", "relu", "softmax", "taylor"),
    "model.mamba3.rotated": (0.5, 1.0),
    "model.mamba3.A_activation": ("heavy_tail", "softplus"),
    "model.mlp.activation": ("silu", "gelu", "relu"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "training.nan": ("stop", "skip"),
}

# smallest and largest value, both allowed
RANGES = {
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "seq_len": (1, math.inf),
    "model.width": (1, math.inf),
    "model.repeats": (1, math.inf),
    "model.vocab_size": (0, math.inf),
    "model.vocab_multiple": (1, math.inf),
    "model.remat_blocks": (0, math.inf),
    "model.scan_blocks": (0, math.inf),
    "model.dense.depth": (1, math.inf),
    "model.dense.every": (1, math.inf),
    "model.dense.bottleneck": (1, math.inf),
    "model.dense.bottleneck_state": (0, math.inf),
    "model.dense.gate_std": (0, math.inf),
    "model.mamba.state": (1, math.inf),
    "model.mamba.expand": (1, math.inf),
    "model.mamba.conv": (1, math.inf),
    "model.mamba.dt_rank": (0, math.inf),
    "model.mamba2.state": (1, math.inf),
    "model.mamba2.expand": (1, math.inf),
    "model.mamba2.head_dim": (1, math.inf),
    "model.mamba2.groups": (1, math.inf),
    "model.mamba2.conv": (2, 8),
    "model.mamba3.state": (1, math.inf),
    "model.mamba3.expand": (1, math.inf),
    "model.mamba3.head_dim": (1, math.inf),
    "model.mamba3.groups": (1, math.inf),
    "model.linear_attention.heads": (1, math.inf),
    "model.performer.heads": (1, math.inf),
    "model.performer.random_features": (1, math.inf),
    "model.performer.redraw": (0, math.inf),
    "model.gla.heads": (1, math.inf),
    "model.gla.key_dim": (0, math.inf),
    "model.gla.value_dim": (0, math.inf),
    "model.gla.gate_rank": (1, math.inf),
    "model.gla.gate_divisor": (1, math.inf),
    "model.retnet.heads": (1, math.inf),
    "model.retnet.key_dim": (0, math.inf),
    "model.retnet.value_dim": (0, math.inf),
    "model.retnet.init_std": (0, math.inf),
    "model.attention.heads": (1, math.inf),
    "model.attention.kv_heads": (0, math.inf),
    "model.attention.head_dim": (0, math.inf),
    "model.mlp.hidden": (0, math.inf),
    "optimizer.warmup": (0, math.inf),
    "optimizer.decay": (0, 1),
    "optimizer.floor": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip": (0, math.inf),
    "training.accumulate": (1, math.inf),
    "training.z_loss": (0, math.inf),
    "training.loss_chunk": (0, math.inf),
    "training.profile_start": (0, math.inf),
    "training.profile_steps": (1, math.inf),
    "mesh.fsdp": (1, math.inf),
    "mesh.tensor": (1, math.inf),
    "mesh.sequence": (1, math.inf),
    "mesh.expert": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "evaluation.every": (0, math.inf),
    "evaluation.rows": (1, math.inf),
    "evaluation.batch_size": (0, math.inf),
    "metrics.every": (1, math.inf),
    "sample.tokens": (0, math.inf),
    "sample.temperature": (0, math.inf),
    "sample.top_k": (0, math.inf),
}

STREAMS = ("mamba", "mamba2", "retnet")  # mixers with a hidden stream, which DenseSSM reads

POSITIVE = ("model.embedding_std", "model.norm_eps", "optimizer.learning_rate", "optimizer.eps", "sample.top_p")
SHARES = ("model.dropout", "optimizer.b1", "optimizer.b2", "optimizer.ema")  # at least 0, under 1


def validate(config: ConfigDict) -> None:
    """Check every field that can be checked without a device, a tokenizer or data.

    Raises UserError: one line with the field, its value and what is allowed.
    """
    for field, allowed in CHOICES.items():
        if (value := _get(config, field)) is not None and value not in allowed:
            _refuse(field, value, "one of " + ", ".join(repr(name) for name in allowed))
    for field, (low, high) in RANGES.items():
        if (value := _get(config, field)) is not None and not low <= value <= high:
            _refuse(field, value, f"at least {low}" if high == math.inf else f"between {low} and {high}")
    for field in POSITIVE:
        if not 0 < _get(config, field) < math.inf:
            _refuse(field, _get(config, field), "greater than 0")
    for field in SHARES:
        if not 0 <= _get(config, field) < 1:
            _refuse(field, _get(config, field), "at least 0 and less than 1")
    if config.sample.top_p > 1:
        _refuse("sample.top_p", config.sample.top_p, "at most 1")
    if config.mesh.data != -1 and config.mesh.data < 1:
        _refuse("mesh.data", config.mesh.data, "at least 1, or -1 for the devices that the other axes leave")
    if not config.evaluation.lengths or min(config.evaluation.lengths) < 1:
        _refuse("evaluation.lengths", tuple(config.evaluation.lengths), "multiples of seq_len, each at least 1")
    if config.batch_size % config.training.accumulate:
        _refuse("batch_size", config.batch_size, f"a multiple of training.accumulate={config.training.accumulate}")
    _validate_model(config.model, bptt=config.training.bptt)


def blocks(pattern: str) -> list[tuple[str, ...]]:
    """Layers of a pattern: "mamba attention+mlp" is [("mamba",), ("attention", "mlp")]."""
    return [tuple(block.split("+")) for block in pattern.split()]


def context(config: ConfigDict) -> int | None:
    """Tokens that the model can see: `seq_len` where its state is a cache of keys, None (any number) where constant."""
    return config.seq_len if any("attention" in block for block in blocks(config.model.pattern)) else None


def _validate_model(model: ConfigDict, *, bptt: bool) -> None:
    names = {name for block in blocks(model.pattern) for name in block}
    if not names:
        _refuse("model.pattern", model.pattern, "at least one block, such as 'mamba' or 'attention+mlp'")
    groups = [name for name, value in model.items() if isinstance(value, ConfigDict)]
    fields = [name for name in groups if name not in ("dense", "implementation")]
    if not names <= set(fields):
        _refuse("model.pattern", model.pattern, f"of blocks that this config has fields for: {', '.join(fields)}")
    if model.scan_blocks and model.repeats % model.scan_blocks:
        _refuse("model.scan_blocks", model.scan_blocks, f"0, or a divisor of model.repeats={model.repeats}")
    if bptt and "attention" in names:
        _refuse("training.bptt", bptt, "False with attention in model.pattern: a cache of keys is no constant state")
    if bptt and "performer" in names and model.performer.redraw:
        _refuse("model.performer.redraw", model.performer.redraw, "0 with training.bptt: states are made of features")
    if model.dense.variant != "none":
        if not names & set(STREAMS):
            allowed = f"'none' without one of {', '.join(STREAMS)} in model.pattern"
            _refuse("model.dense.variant", model.dense.variant, allowed)
        if names & {"mamba2", "retnet"}:
            if model.dense.variant == "carry":
                _refuse("model.dense.variant", "carry", "one of 'read', 'input', 'output', 'rank' with a matrix state")
            if model.dense.projection != "identity":
                _refuse("model.dense.projection", model.dense.projection, "'identity' with a matrix state")
        if model.dense.gate != "none" and model.width < model.dense.bottleneck:
            _refuse("model.dense.bottleneck", model.dense.bottleneck, f"at most model.width={model.width}")
    for name in ("linear_attention", "performer"):
        if name in names and model.width % model[name].heads:
            _refuse(f"model.{name}.heads", model[name].heads, f"a divisor of model.width={model.width}")
    if "retnet" in names:
        _validate_retnet(model.retnet, model.width)
    if "attention" in names:
        _validate_attention(model.attention, model.width)


def _validate_retnet(retnet: ConfigDict, width: int) -> None:
    if width % retnet.heads and not (retnet.key_dim and retnet.value_dim):
        allowed = f"a divisor of model.width={width}, or key_dim and value_dim must be set"
        _refuse("model.retnet.heads", retnet.heads, allowed)
    if (key_dim := retnet.key_dim or width // retnet.heads) % 2 or not key_dim:
        _refuse("model.retnet.key_dim", key_dim, "even, as rotations turn pairs")


def _validate_attention(attention: ConfigDict, width: int) -> None:
    if not attention.head_dim and width % attention.heads:
        _refuse("model.attention.heads", attention.heads, f"a divisor of model.width={width}, or head_dim must be set")
    if attention.heads % (attention.kv_heads or attention.heads):
        _refuse("model.attention.kv_heads", attention.kv_heads, f"a divisor of heads={attention.heads}, or 0 for all")
    if (head_dim := attention.head_dim or width // attention.heads) % 2:
        _refuse("model.attention.head_dim", head_dim, "even, as rotary positions turn pairs")


def _get(config: ConfigDict, field: str) -> Any:
    """Value of a dotted field, or None where this config has no such part."""
    value = config
    for name in field.split("."):
        if name not in value:
            return None
        value = value[name]
    return value


def _refuse(field: str, value: Any, allowed: str) -> None:
    raise UserError(f"config.{field}={value!r}: must be {allowed}")
