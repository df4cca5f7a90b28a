"""Options of softmax attention (seqmodels/mixers/attention.py)."""

from typing import Any

from seqmodels.fields import Field, Group, Rule, above, at_least, one_of, refuse

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
    if options.positions in ROTARY and (turned := int(head_dim * options.rotary)) % 2:
        refuse("model.attention.rotary", options.rotary, f"a share that makes an even number of channels, not {turned}")
    if options.positions == "xpos" and options.rotary != 1:
        refuse("model.attention.rotary", options.rotary, "1.0 with positions='xpos', whose pairs all decay")
    if options.scaling != "none" and options.positions != "rope":
        refuse("model.attention.scaling", options.scaling, f"'none' with positions={options.positions!r}")
    if options.scaling == "ntk" and head_dim * options.rotary < 4:
        refuse("model.attention.scaling", "ntk", f"another with head_dim={head_dim}, of which one pair turns")
    if options.scaling in BY_LENGTH and options.trained_length < 2:
        allowed = f"at least 2 with scaling={options.scaling!r}"
        refuse("model.attention.trained_length", options.trained_length, allowed)
    if options.sinks > options.window:
        refuse("model.attention.sinks", options.sinks, f"at most model.attention.window={options.window}")
    if options.mask != "causal" and options.window:
        refuse("model.attention.window", options.window, f"0 with mask={options.mask!r}, which chooses the tokens")
    if options.mask == "fixed" and options.summary > options.stride:
        refuse("model.attention.summary", options.summary, f"at most model.attention.stride={options.stride}")
    if options.log_n == 1:
        refuse("model.attention.log_n", options.log_n, "0 or at least 2, as ln(1) is 0")


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
            "how a token's position enters: rope (queries and keys are rotated), xpos (they also decay with distance), "
            "alibi, kerple, sandwich, t5 (a bias of the scores by distance) or none (only the mask knows it, as in "
            "Jamba, where recurrent layers see the order)",
            one_of("rope", "none", "xpos", "alibi", "kerple", "sandwich", "t5"),
            since=2,
        ),
        "rope_theta": Field(1e4, "base of the rotary positions' wavelengths; read with positions=rope", above(0)),
        "rotary": Field(
            1.0,
            "share of a head's channels, the first ones, that rotary positions turn; 0.25 in GPT-NeoX",
            Rule(lambda share: 0 < share <= 1, "greater than 0 and at most 1"),
            since=2,
        ),
        "rope_style": Field(
            "half",
            "which channels of a head rotary positions turn together: i and i + d/2 (half, as Llama) or 2i and 2i + 1 "
            "(interleaved, as GPT-J)",
            one_of("half", "interleaved"),
            since=2,
        ),
        "scaling": Field(
            "none",
            "change of rotary positions for rows longer than in training (docs/positions.md); rerope and leaky_rerope "
            "are for measuring trained models",
            one_of(*SCALINGS),
            since=2,
        ),
        "scaling_factor": Field(
            1.0, "by which rows are longer than in training; read with scaling", at_least(1), since=2
        ),
        "trained_length": Field(
            0,
            f"tokens of a row in training; read with scaling={', '.join(BY_LENGTH)}",
            at_least(0),
            since=2,
        ),
        "biases": Field(
            "all",
            "projections with a bias where model.bias is True: all, or out, that of the output alone (RecurrentGemma)",
            one_of("all", "out"),
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
        "sinks": Field(0, "first tokens of its document that a token sees beside its window", at_least(0), since=2),
        "mask": Field(
            "causal",
            "earlier tokens that a token sees: causal (all, or the window), or blocks: strided, fixed, bigbird",
            one_of("causal", "strided", "fixed", "bigbird"),
            since=2,
        ),
        "block": Field(
            64, "tokens per block of a pattern; read with mask=strided, fixed, bigbird", at_least(1), since=2
        ),
        "stride": Field(
            8,
            "strided: the newest blocks that a token sees, and the step between the others; fixed: blocks per group",
            at_least(1),
            since=2,
        ),
        "summary": Field(
            1, "last blocks of each group that all later tokens see; read with mask=fixed", at_least(1), since=2
        ),
        "near": Field(3, "newest blocks that a token sees; read with mask=bigbird", at_least(1), since=2),
        "first": Field(
            1, "first blocks of the document that all tokens see; read with mask=bigbird", at_least(0), since=2
        ),
        "random": Field(3, "random earlier blocks that a token sees; read with mask=bigbird", at_least(0), since=2),
        "softcap": Field(
            0.0, "scores s become softcap tanh(s / softcap), as in Gemma 2; 0: they stay", at_least(0), since=2
        ),
        "qk_norm": Field(
            "none",
            "norm of queries and keys: none; rms over the channels of a head, with learned scales (Qwen 3); centred, "
            "the same with 1 + w as scales (Qwen3-Next); or all, over the channels of all heads (OLMo 2)",
            one_of("none", "rms", "centred", "all"),
            since=2,
        ),
        "qk_norm_eps": Field(1e-6, "epsilon of that norm", above(0), since=2),
        "output_gate": Field(
            False,
            "the output of every head is multiplied by the sigmoids of a projection of the input, as in Qwen3-Next",
            since=2,
        ),
        "log_n": Field(
            0,
            "tokens per row in training: queries at later positions n are scaled by ln(n) / ln(log_n); 0: they are not",
            at_least(0),
            since=2,
        ),
        "forget": Field(
            False,
            "forget gates: scores fall by the logarithms of the gates between key and query (Forgetting Transformer)",
            since=2,
        ),
    },
    check,
)
