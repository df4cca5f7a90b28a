"""MixCon (Xu and Lin 2024, doi 10.3233/FAIA240593): Conba and attention (6 and 2 of 8 layers), and experts.

Command:   python train.py --config=configs/mixcon.py --workdir=runs/mixcon
Hardware:  2 CPU cores. `:5b-active` 8 GPUs, `:repo` and `:paper-layout` 16 (planned with --plan, never run)
Expected:  validation 2.088, test 2.123 bits per byte (small; 2026-11-30; xz -9: 2.591, 2.543)
Cost:      about 20 minutes of training on 2 CPU cores (small; from the time of single layers)

Presets: small (no argument); test (11.4 M parameters); repo, paper-layout and 5b-active, because the sizes of the paper
(60 B, of which a token uses 5 B, with 2 GB of cache) exclude each other (docs/models.md); the ablations only_attention,
only_conba, only_mamba, 1to7 and 2to6 without experts, and the same with experts (2to6-moe is small); and mqar and
copying, which are 2to6 on synthetic tasks. Ablations have as many parameters as small, within 2 %: their MLPs differ.
Attention has no positions, except in only_attention, where nothing else knows the order.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqmodels.configs import synthetic
from seqmodels.configs.base import base, finish, large, preset
from seqmodels.configs.trials import Trial
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.conba import CONBA
from seqmodels.fields.conba_seq import CONBA_SEQ
from seqmodels.fields.mamba import MAMBA
from seqmodels.fields.mlp import MLP
from seqmodels.fields.moe import MOE

LAYOUTS = {
    "only_attention": "attention+mlp x8",
    "only_conba": "conba+mlp x8",
    "only_mamba": "mamba+mlp x8",
    "1to7": "(conba+mlp) x8 attention@4/8",
    "2to6": "(conba+mlp) x8 attention@3/8 attention@4/8",
}
EXPERTS = " +moe@1/2"  # behind a layout: experts in place of every second MLP

# name: (layout, width, groups of 8 layers, heads, key heads, inner width of MLP and experts, experts, vocabulary, peak
# learning rate, mesh.fsdp, mesh.expert). repo: the sizes of the published code. paper-layout: those, with the paper's
# layout, vocabulary and bytes of cache. 5b-active: of the paper's layout, sizes for which a token uses 5 B parameters.
PUBLISHED = {
    "repo": ("1to7", 4096, 4, 32, 8, 14336, 16, 65536, 1.2e-4, 8, 2),
    "paper-layout": ("2to6", 4096, 4, 32, 2, 14336, 16, 262144, 1.2e-4, 8, 2),
    "5b-active": ("2to6", 2560, 4, 40, 4, 7680, 16, 262144, 1.6e-4, 8, 1),
}
TASKS = {  # what the argument of configs/synthetic.py is, the fields of the task that differ from it, rows and steps
    "mqar": (
        "mqar,length=64,vocab=64",
        dict(shapes=((32, 4, 1.0), (64, 8, 1.0)), test_shapes=((32, 4), (64, 8), (128, 16))),
        256,
        1500,
    ),
    "copying": ("copying,length=48,tokens=16", {}, 128, 1000),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The preset `arg`, locked; 1:7 is another name of 1to7. Raises ValueError if there is no such preset."""
    ablations = [*LAYOUTS, *(f"{layout}-moe" for layout in LAYOUTS)]
    chosen = preset(arg and arg.replace(":", "to"), ["small", "test", *PUBLISHED, *ablations, *TASKS])
    config = base()
    if chosen in TASKS:
        config = _of_task(chosen)
    _add_model(config.model)
    if chosen == "test":
        config.model.update(dict(width=256, vocab_size=512))
        config.model.attention.update(dict(heads=4, kv_heads=2))
        config.model.mlp.hidden = config.model.moe.hidden = 512
        _set_states(config.model)
    elif chosen in PUBLISHED:
        _set_sizes(config, *PUBLISHED[chosen])
    elif chosen != "small":
        layout, _, experts = ("2to6" if chosen in TASKS else chosen).partition("-")
        config.update_from_flattened_dict(ablation(config.model, layout, bool(experts)))
    return finish(config, "mixcon", chosen)


def _add_model(model: ConfigDict) -> None:
    """The model of the small preset, in place, with the options of every branch of the ablations."""
    model.pattern = LAYOUTS["2to6"] + EXPERTS
    model.width, model.repeats = 64, 1
    model.norm_eps = 1e-6
    model.tie_embeddings = False
    # half of the paper's state, and heads of 16 channels, for the speed on CPUs
    model.conba = CONBA.defaults(state=8, head_dim=16)
    model.conba_seq = CONBA_SEQ.defaults(state=8, head_dim=16)
    model.mamba = MAMBA.defaults(state=8, norms="learned", norm_eps=1e-6)
    model.attention = ATTENTION.defaults(heads=4, kv_heads=2, positions="none")
    model.mlp = MLP.defaults(hidden=64)
    model.moe = MOE.defaults(experts=4, top_k=2, hidden=64, router="softmax", balance=1e-3)


def _set_sizes(
    config: ConfigDict,
    layout: str,
    width: int,
    groups: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    experts: int,
    vocab_size: int,
    learning_rate: float,
    fsdp: int,
    expert: int,
) -> None:
    """Sets the sizes of a large preset, in place."""
    large(config, learning_rate=learning_rate, steps=100_000, remat="block")
    model = config.model
    model.pattern = LAYOUTS[layout] + EXPERTS
    model.width, model.repeats, model.vocab_size, model.scan_blocks = width, groups, vocab_size, 1
    model.attention.heads, model.attention.kv_heads = heads, kv_heads
    model.mlp.hidden = model.moe.hidden = hidden
    model.moe.experts = experts
    _set_states(model)
    config.mesh.fsdp, config.mesh.expert = fsdp, expert
    config.training.accumulate = 128 // (fsdp * expert)  # 2 rows a device at once


def _set_states(model: ConfigDict) -> None:
    """Sets the sizes of the published states and of the heads of control, in place."""
    for options in (model.conba, model.conba_seq, model.mamba):
        options.state = 16
    model.conba.head_dim = model.conba_seq.head_dim = 64


def _of_task(name: str) -> ConfigDict:
    """Data and training of a synthetic task, without a model."""
    arg, fields, rows, steps = TASKS[name]
    config = ConfigDict(synthetic.get_config(arg).to_dict())
    config.batch_size, config.steps = rows, steps
    config.evaluation.every = config.checkpoint.every = steps // 5
    config.data.task.update(fields)
    config.model = base().model
    config.model.embedding_std = 0.3
    config.optimizer.learning_rate = 3e-3
    return config


def ablation(model: ConfigDict, layout: str, experts: bool) -> Trial:
    """Another layout with as many parameters as `model` has: a trial.

    MLPs and experts have one inner width, as in the paper, so with experts a token uses fewer parameters.
    """
    pattern = LAYOUTS[layout] + (EXPERTS if experts else "")
    trial = {"model.pattern": pattern, "model.attention.positions": "rope" if layout == "only_attention" else "none"}
    return trial | matched(model, trial)


def matched(model: ConfigDict, trial: Trial) -> Trial:
    """The inner width of MLPs and experts with which a trial has as many parameters as `model`, as nearly as it can."""
    changed = ConfigDict({"model": model.to_dict()})
    changed.update_from_flattened_dict(trial)
    changed.model.mlp.hidden = changed.model.moe.hidden = 0
    without = parameters(changed.model)
    changed.model.mlp.hidden = changed.model.moe.hidden = 1
    hidden = round((parameters(model) - without) / (parameters(changed.model) - without))
    return {"model.mlp.hidden": hidden, "model.moe.hidden": hidden}


def parameters(model: ConfigDict) -> int:
    """Number of parameters of a model of one of the layouts, from its sizes."""
    layout, experts = model.pattern.removesuffix(EXPERTS), model.pattern.endswith(EXPERTS)
    names = {pattern: name for name, pattern in LAYOUTS.items()}
    attention = {"only_attention": 8, "1to7": 1, "2to6": 2}.get(names[layout], 0)
    recurrent = mamba(model, "mamba") if names[layout] == "only_mamba" else conba(model)
    D, H = model.width, model.attention.heads
    mlp, moe = 3 * D * model.mlp.hidden, model.moe.experts * (3 * D * model.moe.hidden + D)
    head_dim = model.attention.head_dim or D // H
    group = attention * 2 * D * head_dim * (H + (model.attention.kv_heads or H)) + (8 - attention) * recurrent
    group += 4 * (mlp + (moe if experts else mlp)) + 16 * D  # and an RMSNorm before every branch
    V = -(-(model.vocab_size or 257) // model.vocab_multiple) * model.vocab_multiple
    return model.repeats * group + D + V * D * (1 if model.tie_embeddings else 2)


def mamba(model: ConfigDict, branch: str) -> int:
    """Number of parameters of one Mamba with learned norms; `branch`: the one whose options have its sizes."""
    options, D = model[branch], model.width
    E, N, W = options.expand * D, options.state, options.conv
    R = options.dt_rank or -(-D // 16)
    return 3 * D * E + (W + 1) * E + E * (R + 2 * N) + (R + 1) * E + E * N + E + R + 2 * N


def conba(model: ConfigDict) -> int:
    """Number of parameters of one Conba."""
    options, E, N = model.conba, model.conba.expand * model.width, model.conba.state
    P, H = options.head_dim, E // options.head_dim
    count = mamba(model, "conba") + N * N + N  # and the delay's matrix
    if options.scaling != "off":
        count += N * N + N
    if options.control != "off":
        rate = E * H + H if options.gain == "input" else H  # of the gain's step, and of its memory
        count += E + H + H * P * P + rate * (1 if options.rule == "published" else 2)
    return count


def sweep(add: Callable[[dict], None], arg: str | None = None) -> None:
    """The paper's ablation at equal parameters: the layouts, each with and without experts."""
    model = get_config(arg).model
    for layout in LAYOUTS:
        for experts in (False, True):
            add(ablation(model, layout, experts))


def switches(add: Callable[[dict], None], arg: str | None = None) -> None:
    """Each switch of Conba alone in the layout of the config, at equal parameters; the first trial has the defaults."""
    model = get_config(arg).model
    changes: list[Trial] = [
        {},
        {"model.conba.control": "off"},
        {"model.conba.control": "input"},
        {"model.conba.control": "input", "model.conba.sweeps": 2},
        {"model.conba.delay": 0},
        {"model.conba.delay": 2},
        {"model.conba.scaling": "off"},
        {"model.conba.scaling": "literal"},
        {"model.conba.scaling": "off", "model.conba.control": "off"},
        {"model.conba.gain": "scalar"},
        {"model.conba.rule": "published"},
        {"model.conba.head_dim": 2 * model.conba.head_dim},
        {"model.conba.process_noise": 0.01},
        {"model.conba.observation_noise": 0.01},
        {"model.conba.state_eval": "folded"},
    ]
    for change in changes:
        add(change | matched(model, change))


SWEEPS = {"switches": switches}  # beside `sweep`, which is "ablation"
