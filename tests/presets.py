"""The configs with a mixer, and their presets."""

import importlib

NAMES = (
    *(
        "bigbird",
        "cnn",
        "deltanet",
        "densemamba",
        "denseretnet",
        "gated_deltanet",
        "gla",
        "griffin",
        "gru",
        "h3",
        "hgrn",
        "hyena",
        "jamba",
    ),
    *("linear_attention", "llama", "lstm", "mamba", "mamba2", "mamba3", "mingru", "minlstm", "mistral", "mixcon"),
    *("mixtral", "performer", "pythia", "retnet", "rwkv", "s4", "s4d", "s5", "samba"),
    *("sparse_transformer", "transformer"),
)


def config_of(name, arg=None):
    """The preset `arg` of the config `name`."""
    return importlib.import_module(f"seqmodels.configs.{name}").get_config(arg)
