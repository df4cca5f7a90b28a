"""Sparse Transformer (Child et al. 2019, arXiv 1904.10509): a token sees its group, and summaries of those before.

Command:   python train.py --config=configs/sparse_transformer.py --workdir=runs/sparse_transformer
Hardware:  2 CPU cores
Expected:  validation 2.327, test 2.354 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      8 minutes of training on one CPU core (small)

Preset: small, the Transformer of configs/transformer.py with the paper's `fixed` pattern, which is the one for text, in
blocks of 16 tokens: groups of 4 blocks, the last of which all later tokens see. `model.attention.mask=strided` is the
one for images. The paper gives each pattern two heads of its own, or takes them in turns; here a head sees both parts.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs.base import base, finish, preset
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.mlp import MLP


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked. Raises ValueError if there is no such preset."""
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "attention+mlp"
    config.model.attention = ATTENTION.defaults(heads=4, kv_heads=2, mask="fixed", block=16, stride=4, summary=1)
    config.model.mlp = MLP.defaults(hidden=176)
    return finish(config, "sparse_transformer", chosen)


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """All tokens, the other pattern, smaller groups, and longer summaries. Each trial is a dict of dotted fields."""
    for mask in ("causal", "strided"):
        add({"model.attention.mask": mask})
    add({"model.attention.stride": 2})
    add({"model.attention.summary": 2})
