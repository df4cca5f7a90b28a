"""Fields of every model: `config.model` without the options of its branches."""

from typing import Any

from seqmodels.fields import Field, Group, Rule, above, at_least, one_of, refuse, share
from seqmodels.fields.depth import KINDS
from seqmodels.fields.field import WIDEST
from seqmodels.kernels import OPERATIONS

DTYPES = one_of("float32", "bfloat16", "float16")

MODEL = Group(
    "model",
    {
        "width": Field(128, "D, channels of the residual stream", at_least(1), largest=WIDEST),
        "pattern": Field(
            "mamba",
            "one group of blocks, from bottom to top, apart by spaces: a+b is two branches one after the other, a|b "
            "two side by side, bi:a a branch in both directions of time (docs/configs.md)",
        ),
        "repeats": Field(4, "how often the pattern is repeated", at_least(1)),
        "vocab_size": Field(0, "size of the vocabulary; 0: the tokenizer's, rounded up to vocab_multiple", at_least(0)),
        "vocab_multiple": Field(8, "what a vocabulary size of 0 is rounded up to a multiple of", at_least(1)),
        "tie_embeddings": Field(True, "the matrix of the logits is that of the embeddings"),
        "embedding_std": Field(0.02, "standard deviation of fresh embeddings", above(0)),
        "embedding_scale": Field(
            1.0, "factor of the input that the blocks read, such as sqrt(width) in Gemma", above(0), since=2
        ),
        "logit_softcap": Field(
            0.0,
            "logits z of next_token become logit_softcap tanh(z / logit_softcap), as in Gemma; 0: they stay",
            at_least(0),
            since=2,
        ),
        "norm": Field(
            "rms",
            "kind of the norms before every branch and after the last block: rms, centred (rms whose scale is 1 + w, "
            "with w = 0 at first, as in Gemma) or layer",
            one_of("rms", "centred", "layer"),
            since=2,
        ),
        "norm_eps": Field(1e-5, "epsilon of those norms", above(0)),
        "norms_behind": Field(
            "",
            "branches, apart by spaces: blocks with one of them have their norms behind the branches, x + "
            "norm(branch(x)) (attention in OLMo Hybrid); empty: x + branch(norm(x)) in all blocks",
            since=2,
        ),
        "embedding_norm": Field(False, "one more such norm, behind the input, as in RWKV-4", since=2),
        "bias": Field(False, "biases in layer norms, and in the projections of branches that can have them", since=2),
        "short_conv": Field(
            0,
            "newest tokens that a causal convolution before every mixer of time sees, its own included; 0: there is no "
            "such convolution",
            Rule(lambda taps: taps == 0 or 2 <= taps <= 8, "0, or from 2 to 8"),
            since=2,
        ),
        "parallel_norms": Field(
            False,
            "branches side by side (a|b) have a norm each, as in GPT-NeoX; False: they read the same normed input",
            since=2,
        ),
        "dropout": Field(0.0, "share of the numbers dropped at the output of every branch and of the input", share),
        "dtype": Field(
            "float32", "dtype of activations and matrix products; parameters, states and losses are float32", DTYPES
        ),
        "residual_dtype": Field("float32", "dtype of the residual stream", DTYPES),
        "input": Field(
            "tokens",
            "what the model reads: tokens (numbers of a vocabulary), frames (vectors of numbers, such as audio or "
            "pixels), one_hot (a small alphabet, such as DNA) or patches (several frames as one step)",
            one_of("tokens", "frames", "one_hot", "patches"),
            since=2,
        ),
        "head": Field(
            "next_token",
            "what the model predicts: next_token, classify (a class for each row), regress (numbers for each row), "
            "forecast (numbers for each of the next steps, at every step), window (the same, once for a row), pair (a "
            "class for two texts of a row), rebuild (all tokens of a row, from its last hidden state), next_value "
            "(mean and variance of the next numbers, at every step) or regress_steps (of other numbers at every step)",
            one_of(
                *("next_token", "classify", "regress", "forecast", "window", "pair", "rebuild", "next_value"),
                "regress_steps",
            ),
            since=2,
        ),
        "positions": Field(
            "none",
            "vectors of positions added to the input: learned, sinusoidal or none (attention has its own: "
            "model.attention.positions)",
            one_of("none", "learned", "sinusoidal"),
            since=2,
        ),
        "position_table": Field(
            0,
            "learned vectors, at least as many as a document has tokens; read with positions=learned",
            at_least(0),
            since=2,
        ),
        "rescale": Field(
            1.0,
            "distance of the tokens in time, 1 being that of training: 2 where every second sample is left out; "
            "a factor of the step sizes of mixers that have them",
            above(0),
            since=2,
        ),
        "pool": Field(
            "mean",
            "how classify, regress, window and pair make one vector of a row",
            one_of("mean", "last", "attention", "max"),
            since=2,
        ),
        "horizon": Field(1, "steps ahead that forecast and window predict", at_least(1), since=2),
        "patch": Field(1, "frames in one step of the input patches", at_least(1), since=2),
        "window_norm": Field(
            False,
            "with the heads window and regress_steps: each row is read less its mean, over its deviation, and scaled "
            "back",
            since=2,
        ),
        "observed": Field(
            False, "values may be missing: the batches say which, and the input reads that beside each value", since=2
        ),
        "depth": Field(
            "none",
            "what passes from block to block beside or in place of the residual stream (docs/depth.md); DenseSSM is "
            "model.dense.variant",
            one_of(*KINDS),
            since=2,
        ),
        "remat": Field(
            "none",
            "what of a block is kept for the backward pass, while the rest is computed again, to save memory; none: "
            "all is kept (docs/training.md says what each keeps)",
            one_of("none", "rescan", "mixer", "projected", "scan", "block", "dots", "streams"),
        ),
        "remat_blocks": Field(0, "number of blocks, from the bottom, in which remat is used; 0: all", at_least(0)),
        "scan_blocks": Field(
            0,
            "repeats of the pattern in one step of a scan over layers, which compiles faster; 0: no scan",
            at_least(0),
        ),
    },
    path="model",
)

FIRST_OPERATIONS = ("selective_scan", "short_conv", "attention", "linear_attention")  # of version 1 of the fields

IMPLEMENTATION = Group(
    "implementation",
    {
        name: Field(
            "",
            f"backend of this operation, a file of kernels/{name} such as xla; empty: the fastest one here",
            since=1 if name in FIRST_OPERATIONS else 2,
        )
        for name in OPERATIONS
    },
)


def check_dense(options: Any, width: int) -> None:
    """Whether the options of dense hidden connections fit each other and the model's width."""
    variant, place = options.variant, DENSE.place
    if variant == "none":
        return
    if variant == "output" and options.gate in ("state", "both"):
        refuse(place("gate"), options.gate, "'channel' or 'none' with variant='output', which mixes readouts")
    if variant == "output" and options.projection != "identity":
        refuse(place("projection"), options.projection, "'identity' with variant='output', which mixes readouts")
    if variant in ("rank", "carry") and options.norm:
        refuse(place("norm"), options.norm, f"False with variant={variant!r}")
    if options.gate != "none" and width < options.bottleneck:
        refuse(place("bottleneck"), options.bottleneck, f"at most model.width={width}")


DENSE = Group(
    "dense",
    {
        "variant": Field(
            "none",
            "how layers use the hidden states of the layers below (DenseSSM, docs/densessm.md); none: not at all",
            one_of("none", "read", "input", "output", "rank", "carry"),
        ),
        "depth": Field(2, "m, number of layers below that a layer reads", at_least(1)),
        "every": Field(1, "every how many layers one reads from below", at_least(1)),
        "gate": Field(
            "channel",
            "which numbers of the lower states have a gate: each inner channel, each number of state, both or none",
            one_of("channel", "state", "both", "none"),
        ),
        "activation": Field("silu", "activation of the gates", one_of("silu", "sigmoid", "identity")),
        "bottleneck": Field(32, "the inner width of a gate is width / bottleneck", at_least(1)),
        "bottleneck_state": Field(
            0, "as bottleneck, for the gate of the state (or keys) alone; 0: the same", at_least(0), since=2
        ),
        "per_source": Field(False, "one gate for each layer below, in place of one for all"),
        "projection": Field(
            "identity", "projection of the lower states; linear: an N by N matrix", one_of("identity", "linear")
        ),
        "norm": Field(
            False, "RMSNorm of the fused key and value (input), or of what is added to the readout (read, output)"
        ),
        "norm_eps": Field(1e-5, "epsilon of that norm", above(0), since=2),
        "gate_std": Field(
            0.0, "standard deviation of the gates' fresh matrices; 0: the gates begin closed", at_least(0), since=2
        ),
    },
    check_dense,
)
