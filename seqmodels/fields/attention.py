"""Options of softmax attention (seqmodels/mixers/attention.py)."""

from typing import Any

from seqmodels.fields import Field, Group, above, at_least, one_of, refuse

ROTARY = ("rope", "xpos")
SCALINGS = ("none", "linear", "ntk", "yarn", "llama3", "rerope", "leaky_rerope")
BY_LENGTH = ("yarn", "llama3", "rerope", "leaky_rerope")  # which read trained_length


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    heads, kv_heads = options.heads, options.kv_heads
    if not options.head_dim and width % heads:
        refuse("model.attention.heads", heads, f"a divisor of model.width={width}, or head_dim must be set")
    if heads % (kv_heads or heads):
        refuse("model.attention.kv_heads", kv_heads, f"a divisor of heads={heads}, or 0 for all")
    head_dim = options.head_dim or width // heads
    if options.positions in ROTARY and head_dim % 2:
        made = "" if options.head_dim else f"; it is model.width={width} / heads={heads}"
        refuse("model.attention.head_dim", head_dim, f"even, as rotary positions turn pairs{made}")
    if options.scaling != "none" and options.positions != "rope":
        refuse("model.attention.scaling", options.scaling, f"'none' with positions={options.positions!r}")
    if options.scaling == "ntk" and head_dim < 4:
        refuse("model.attention.scaling", "ntk", f"another with head_dim={head_dim}, which is one pair")
    needs = "log_n" if options.log_n else f"scaling={options.scaling!r}"
    if (options.log_n or options.scaling in BY_LENGTH) and options.trained_length < 2:
        refuse("model.attention.trained_length", options.trained_length, f"at least 2 with {needs}")


ATTENTION = Group(
    "attention",
    {
        "heads": Field(4, "heads of queries", at_least(1)),
        "kv_heads": Field(
            0, "heads of keys and values, each shared by heads / kv_heads queries; 0: heads", at_least(0)
        ),
        "head_dim": Field(0, "channels of a head; 0: width / heads", at_least(0)),
        "positions": Field(
            "rope",
            "how a token's position enters: rope (queries and keys are rotated), xpos (they also decay with distance), a "
            "bias of the scores by distance (alibi, kerple, sandwich, t5), or none (only the mask knows it, as in Jamba, "
            "where recurrent layers see the order)",
            one_of("rope", "none", "xpos", "alibi", "kerple", "sandwich", "t5"),
            since=2,
        ),
        "rope_theta": Field(1e4, "base of the rotary positions' wavelengths; read with positions=rope", above(0)),
        "rope_style": Field(
            "half",
            "which channels of a head rotary positions turn together: i and i + d/2 (half, as Llama) or 2i and 2i + 1 "
            "(interleaved, as GPT-J)",
            one_of("half", "interleaved"),
            since=2,
        ),
        "scaling": Field(
            "none",
            "change of rotary positions for rows longer than in training (docs/positions.md); rerope and leaky_rerope are "
            "for measuring trained models",
            one_of(*SCALINGS),
            since=2,
        ),
        "scaling_factor": Field(
            1.0, "by which rows are longer than in training; read with scaling", at_least(1), since=2
        ),
        "trained_length": Field(
            0,
            f"tokens of a row in training; read with log_n and with scaling={', '.join(BY_LENGTH)}",
            at_least(0),
            since=2,
        ),
        "log_n": Field(
            False,
            "multiply the query at position i by log(i + 1) / log(trained_length) where that is above 1",
            since=2,
        ),
        "init_std": Field(
            0.02,
            "standard deviation of fresh projections of queries, keys and values, and sqrt(2 layers) times that of the "
            "output's; 0.02 is GPT-2's, for widths near 1000; 0: width^-0.5, for any width",
            at_least(0),
            since=2,
        ),
        "window": Field(0, "newest tokens that a token sees, itself included; 0: all", at_least(0), since=2),
    },
    check,
)
