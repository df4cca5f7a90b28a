"""Names, layouts and fields of Mamba-2 models, in files of transformers and of Mamba's authors."""

from collections.abc import Mapping

from seqmodels.errors import UserError
from seqmodels.fields.mamba2 import MAMBA2
from seqmodels.interop.weights import Weight, demand, parts, same, turned

UNLIMITED = ((0.0, float("inf")), [0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # steps; the last is in files


def weights(model: Mapping, tied: bool, embedding: str = "embeddings") -> list[Weight]:
    """Every tensor of a Mamba-2 model. `embedding` is "embedding" in the files of Mamba's authors."""
    V, D, layers, options = model["vocab_size"], model["width"], model["repeats"], model["mamba2"]
    E, N, W, G = options["expand"] * D, options["state"], options["conv"], options["groups"]
    H = E // options["head_dim"]
    found = [
        same(f"backbone.{embedding}.weight", ("embedding",), V, D),
        same("backbone.norm_f.weight", ("final_norm", "scale"), D),
    ]
    for i in range(layers):
        block, mixer = (f"block_{i}",), (f"block_{i}", "mixer")
        theirs = f"backbone.layers.{i}."
        found += [
            same(f"{theirs}norm.weight", (*block, "norm", "scale"), D),
            *parts(
                f"{theirs}mixer.in_proj.weight",
                (D,),
                ((*mixer, "in_proj"), 2 * E, (D, 2, E)),
                ((*mixer, "BC_proj"), 2 * G * N, (D, 2 * G * N)),
                ((*mixer, "dt_proj"), H, (D, H)),
            ),
            *parts(
                f"{theirs}mixer.conv1d.weight",
                (1, W),
                ((*mixer, "conv_weight"), E, (W, E)),
                ((*mixer, "BC_conv_weight"), 2 * G * N, (W, 2 * G * N)),
            ),
            *parts(
                f"{theirs}mixer.conv1d.bias",
                (),
                ((*mixer, "conv_bias"), E, (E,)),
                ((*mixer, "BC_conv_bias"), 2 * G * N, (2 * G * N,)),
            ),
            same(f"{theirs}mixer.dt_bias", (*mixer, "dt_bias"), H),
            same(f"{theirs}mixer.A_log", (*mixer, "A_log"), H),
            same(f"{theirs}mixer.D", (*mixer, "D"), H),
            same(f"{theirs}mixer.norm.weight", (*mixer, "scale"), E),
            turned(f"{theirs}mixer.out_proj.weight", (D, E), (*mixer, "out_proj"), (E, D)),
        ]
    return found if tied else [*found, turned("lm_head.weight", (V, D), ("head",), (D, V))]


def config_of(config: Mapping, vocab_size: int) -> dict:
    """Fields of config.model for a Mamba-2 config of transformers."""
    demand(config, hidden_act=("silu",), use_bias=(False,), use_conv_bias=(True,), time_step_limit=UNLIMITED)
    width, epsilon = config["hidden_size"], config["layer_norm_epsilon"]
    chosen = dict(
        state=config["state_size"],
        expand=config["expand"],
        head_dim=config["head_dim"],
        groups=config["n_groups"],
        conv=config["conv_kernel"],
        norm_eps=epsilon,
    )
    demand(config, num_heads=(chosen["expand"] * width // chosen["head_dim"],))
    return dict(
        pattern="mamba2",
        width=width,
        repeats=config["num_hidden_layers"],
        vocab_size=vocab_size,
        norm_eps=epsilon,
        tie_embeddings=config.get("tie_word_embeddings", False),
        mamba2=chosen,
    )


def original_options(ssm: Mapping) -> dict:
    """Fields of config.model.mamba2, from `ssm_cfg` in a config of Mamba's authors."""
    demand(ssm, rmsnorm=(True,), norm_before_gate=(False,), D_has_hdim=(False,), d_ssm=(None,), dt_limit=UNLIMITED)
    return dict(
        state=ssm.get("d_state", 128),
        expand=ssm.get("expand", 2),
        head_dim=ssm.get("headdim", 64),
        groups=ssm.get("ngroups", 1),
        conv=ssm.get("d_conv", 4),
        norm_eps=1e-5,
    )


def options(model: Mapping) -> dict:
    """config.model.mamba2 with every default filled in."""
    return MAMBA2.complete(model.get("mamba2", {}))


def fields(model: Mapping) -> dict:
    """Fields of config.json for the Mamba-2 mixer."""
    chosen = model["mamba2"]
    if chosen["norm_eps"] != model["norm_eps"]:
        raise UserError(
            f"mamba2.norm_eps is {chosen['norm_eps']}; only model.norm_eps, {model['norm_eps']}, is exported"
        )
    return dict(
        model_type="mamba2",
        architectures=["Mamba2ForCausalLM"],
        state_size=chosen["state"],
        expand=chosen["expand"],
        head_dim=chosen["head_dim"],
        num_heads=chosen["expand"] * model["width"] // chosen["head_dim"],
        n_groups=chosen["groups"],
        conv_kernel=chosen["conv"],
        layer_norm_epsilon=model["norm_eps"],
        use_bias=False,
        use_conv_bias=True,
    )
