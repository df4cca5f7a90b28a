"""Options of retention (seqmodels/mixers/retnet.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, one_of, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    heads = options.heads
    if width % heads and not (options.key_dim and options.value_dim):
        allowed = f"a divisor of model.width={width}, or key_dim and value_dim must be set"
        refuse("model.retnet.heads", heads, allowed)
    if (key_dim := options.key_dim or width // heads) % 2 or not key_dim:
        made = "" if options.key_dim else f"; it is model.width={width} / heads={heads}"
        refuse("model.retnet.key_dim", key_dim, f"even, as rotations turn pairs{made}")


RETNET = Group(
    "retnet",
    {
        "heads": Field(2, "heads, each with a matrix state and a decay", at_least(1)),
        "key_dim": Field(0, "channels of a head's keys and queries; 0: width / heads", at_least(0)),
        "value_dim": Field(0, "channels of a head's values; 0: 2 width / heads", at_least(0)),
        "schedule": Field(
            "octaves",
            "decays of the heads: octaves (1 - 2^-5, 1 - 2^-6, ...) or spread (from 1 - 1/32 to 1 - 1/512)",
            one_of("octaves", "spread"),
        ),
        "angles": Field(
            "retnet",
            "radians a token of rotation i of a head's K / 2, 10000^-x: x = i / (K / 2 - 1) (retnet, as torchscale) or "
            "x = i / (K / 2) (rope, as attention and flash-linear-attention)",
            one_of("retnet", "rope"),
            since=2,
        ),
        "activation": Field("identity", "activation of queries, keys and values", one_of("identity", "silu")),
        "row_scale": Field(False, "divide the readout by the root of the decays' sum, as torchscale does"),
        "norm_eps": Field(1e-6, "epsilon of the heads' norm", above(0)),
        "norm_weight": Field(False, "weights in the heads' norm"),
        "init_std": Field(
            0.0, "standard deviation of all fresh matrices; 0: uniform ones, as in the paper", at_least(0)
        ),
    },
    check,
)
