"""Options of softmax attention (seqmodels/mixers/attention.py)."""

from typing import Any

from seqmodels.fields import Field, Group, Rule, above, at_least, one_of, refuse


def check(options: Any, width: int) -> None:
    """Check that the options fit each other and the model's width."""
    heads, kv_heads = options.heads, options.kv_heads
    if not options.head_dim and width % heads:
        refuse("model.attention.heads", heads, f"a divisor of model.width={width}, or head_dim must be set")
    if heads % (kv_heads or heads):
        refuse("model.attention.kv_heads", kv_heads, f"a divisor of heads={heads}, or 0 for all")
    if options.positions == "rope" and (head_dim := options.head_dim or width // heads) % 2:
        made = "" if options.head_dim else f"; it is model.width={width} / heads={heads}"
        refuse("model.attention.head_dim", head_dim, f"even, as rotary positions turn pairs{made}")
    if options.positions == "rope" and (turned := int((options.head_dim or width // heads) * options.rotary)) % 2:
        refuse("model.attention.rotary", options.rotary, f"a share that makes an even number of channels, not {turned}")


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
            "how a token's position enters: rope (queries and keys are rotated) or none (only the mask knows it, as in "
            "Jamba, where recurrent layers see the order)",
            one_of("rope", "none"),
            since=2,
        ),
        "rope_theta": Field(1e4, "base of the rotary positions' wavelengths; read with positions=rope", above(0)),
        "rotary": Field(
            1.0,
            "share of a head's channels, the first ones, that rotary positions turn; 0.25 in GPT-NeoX",
            Rule(lambda share: 0 < share <= 1, "greater than 0 and at most 1"),
            since=2,
        ),
        "llama3": Field(
            0.0,
            "factor by which wavelengths of rotary positions beyond 8192 tokens are stretched, as Llama 3.1 (8) and "
            "3.2 (32) do; 0: none",
            at_least(0),
            since=2,
        ),
        "window": Field(0, "newest tokens that a token sees, itself included; 0: all", at_least(0), since=2),
    },
    check,
)
