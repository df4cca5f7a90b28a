"""Plans: published counts of parameters and caches to the byte, what is really there, and mistakes in one line."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import data
from seqmodels.configs import jamba, llama, mamba, mistral, mixcon, mixtral, pythia, transformer
from seqmodels.errors import UserError
from seqmodels.model import build
from seqmodels.scripts import train
from seqmodels.training import checkpoint, flops, plan, report, sharding
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.plan import make_plan
from seqmodels.training.state import abstract_params, abstract_state, init_state
from tests.array_data import ArrayDataset, which_channel

CONTEXT = 2**18


def kv_heads_of(config, kv_heads):
    config = config.unlock()
    config.model.attention.kv_heads = kv_heads
    return config


# name: (config, parameters, active parameters, bytes of cache of 2^18 tokens). Published where a paper or a model card
# has the number; the others follow from the published sizes by a closed formula, and from transformers' classes.
MODELS = {
    "llama-2-7b": (lambda: llama.get_config("2-7b"), 6_738_415_616, None, 128 * 2**30),
    "llama-2-13b": (lambda: llama.get_config("2-13b"), 13_015_864_320, None, 214_748_364_800),
    "llama-2-70b": (lambda: llama.get_config("2-70b"), 68_976_648_192, None, 80 * 2**30),
    "llama-3-8b": (lambda: llama.get_config("3-8b"), 8_030_261_248, None, 32 * 2**30),
    "llama-3.1-70b": (lambda: llama.get_config("3.1-70b"), 70_553_706_496, None, 80 * 2**30),
    "llama-3.1-405b": (lambda: llama.get_config("3.1-405b"), 405_853_388_800, None, 126 * 2**30),
    "llama-3.2-1b": (lambda: llama.get_config("3.2-1b"), 1_235_814_400, None, 8 * 2**30),
    "llama-3.2-3b": (lambda: llama.get_config("3.2-3b"), 3_212_749_824, None, 28 * 2**30),
    "smollm2-135m": (lambda: llama.get_config("smollm2-135m"), 134_515_008, None, 30 * 2 * 3 * 64 * 2 * CONTEXT),
    "mistral-7b-v0.1": (lambda: mistral.get_config("7b-v0.1"), 7_241_732_096, None, 2**29),
    "mistral-7b-v0.3": (lambda: mistral.get_config("7b-v0.3"), 7_248_023_552, None, 32 * 2**30),
    **{
        f"pythia-{name}": (lambda name=name: pythia.get_config(name), parameters, None, None)
        for name, parameters in {
            **{"70m": 70_426_624, "160m": 162_322_944, "410m": 405_334_016, "1b": 1_011_781_632},
            **{"1.4b": 1_414_647_808, "2.8b": 2_775_208_960, "6.9b": 6_857_302_016, "12b": 11_846_072_320},
        }.items()
    },
    "mixtral-8x7b": (lambda: mixtral.get_config("8x7b"), 46_702_792_704, 12_879_925_248, 32 * 2**30),
    "mixtral-8x22b": (lambda: mixtral.get_config("8x22b"), 140_630_071_296, 39_161_468_928, 60_129_542_144),
    "jamba-tiny-dev": (lambda: jamba.get_config("tiny-dev"), 318_688_640, 167_693_696, 2 * 2 * 128 * 2 * CONTEXT),
    "jamba-v0.1": (lambda: jamba.get_config("v0.1"), 51_570_323_328, 12_110_311_296, 4 * 2**30),
    "jamba-1.5-mini": (lambda: jamba.get_config("1.5-mini"), 51_570_323_328, 12_110_311_296, 4 * 2**30),
    "jamba-1.5-large": (lambda: jamba.get_config("1.5-large"), 398_555_145_696, 94_149_338_592, 9 * 2**30),
    "mixcon-2to6": (lambda: mixcon.get_config("paper-layout"), 52_940_276_224, 13_480_264_192, 2 * 2**30),
    "mixcon-2to6-8-heads": (lambda: kv_heads_of(mixcon.get_config("paper-layout"), 8), None, None, 8 * 2**30),
    "mixcon-repo": (lambda: mixcon.get_config("repo"), 51_643_979_008, 12_183_966_976, 4 * 2**30),
    "mixcon-5b-active": (lambda: mixcon.get_config("5b-active"), 18_519_025_024, 5_306_967_424, 2 * 2**30),
    "mixcon-test": (lambda: mixcon.get_config("test"), 11_407_216, 8_261_488, 2 * 2 * 128 * 4 * CONTEXT),
}
# As published: billions of parameters, and of active ones.
ROUNDED = {
    "llama-2-7b": ("6.7", "6.7"),
    "mistral-7b-v0.1": ("7.2", "7.2"),
    "mixtral-8x7b": ("46.7", "12.9"),
    "jamba-v0.1": ("52", "12"),
    "jamba-1.5-large": ("398", "94"),
}


@pytest.fixture(scope="module")
def plans():
    """The plan of each of MODELS, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = make_plan(MODELS[name][0](), CONTEXT)
        return made[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_published_counts_and_caches(plans, name):
    _, parameters, active, cache = MODELS[name]
    found = plans(name)
    assert cache is None or found["kv_cache_bytes"] == cache
    if parameters is not None:
        assert found["parameters"] == parameters
        assert found["active_parameters"] == (active or parameters)
    for field in ("parameters", "active_parameters", "kv_cache_bytes", "recurrent_state_bytes"):
        assert type(found[field]) is int
        assert found[field] == sum(row[field] for row in found["branches"].values())


@pytest.mark.parametrize("name", ROUNDED)
def test_what_papers_round(plans, name):
    for field, published in zip(("parameters", "active_parameters"), ROUNDED[name], strict=True):
        digits = len(published.partition(".")[2])
        # the papers cut 398.56 to 398
        billions = plans(name)[field] / 1e9
        assert published in (f"{billions:.{digits}f}", str(math.floor(billions))), (field, billions)


def test_cache_of_a_shape_from_the_formula(plans):
    """2 (keys and values) x layers with attention x key heads x channels x 2 bytes x tokens."""
    for name, layers, kv_heads, head_dim in (
        ("llama-2-13b", 40, 40, 128),
        ("mixtral-8x22b", 56, 8, 128),
        ("jamba-1.5-large", 9, 8, 128),
        ("mixcon-2to6", 8, 2, 128),
    ):
        assert plans(name)["kv_cache_bytes"] == 2 * layers * kv_heads * head_dim * 2 * CONTEXT


def test_recurrent_state_is_float32_with_one_column_less(plans):
    """transformers stores bfloat16 and W columns of the convolution, not W - 1: 9,175,040 bytes for Jamba-v0.1."""
    inner, state, conv, layers = 8192, 16, 4, 28
    assert layers * inner * (state + conv) * 2 == 9_175_040
    assert plans("jamba-v0.1")["recurrent_state_bytes"] == layers * inner * (state + conv - 1) * 4
    assert plans("jamba-1.5-large")["recurrent_state_bytes"] == 63 * 16384 * (state + conv - 1) * 4
    assert plans("mixcon-2to6")["recurrent_state_bytes"] == 24 * 811_008 * 4  # Conba's states, the gains among them
    assert plans("llama-2-7b")["recurrent_state_bytes"] == 0


def test_live_cache(plans):
    """The leaves of `init_state` themselves, called k and v."""
    model = build(jamba.get_config("v0.1").model, 257)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: model.init_state(1, CONTEXT)))
    cache = [leaf for path, leaf in leaves if path[-1].key in ("k", "v")]
    assert {leaf.dtype for leaf in cache} == {jnp.dtype("bfloat16")}
    assert sum(leaf.size * 2 for leaf in cache) == plans("jamba-v0.1")["kv_cache_bytes"]
    rest = sum(leaf.size * leaf.dtype.itemsize for path, leaf in leaves if path[-1].key not in ("k", "v"))
    assert plans("jamba-v0.1")["recurrent_state_bytes"] + plans("jamba-v0.1")["bookkeeping_bytes"] == rest


def test_a_plan_of_the_largest_takes_seconds():
    begin = time.monotonic()
    make_plan(jamba.get_config("1.5-large"), CONTEXT)
    assert time.monotonic() - begin < 60  # 2 s on an idle machine


# A plan is what a run has


def tiny(config, **fields):
    config = config.unlock()
    config.update(dict(batch_size=8, seq_len=8))
    config.model.update(width=16, **fields)
    return config


def hybrid(**mesh):
    config = tiny(jamba.get_config(), pattern="mamba+mlp attention+moe")
    config.model.mlp.hidden = config.model.moe.hidden = 8
    config.model.mamba.state = 4
    config.optimizer.ema = 0.9
    config.mesh.update(dict(data=2, **mesh))
    return config


@pytest.mark.parametrize("mesh", [{}, dict(fsdp=2, tensor=2)], ids=str)
def test_training_state_and_checkpoint_are_those_of_a_run(mesh):
    config = hybrid(**mesh)
    model, real = build(config.model, 257), sharding.make_mesh(config)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    state = init_state(model, optimizer, config, abstract_state(model, optimizer, config, real))
    found = make_plan(config)

    def held(tree):
        first = real.devices.flat[0]
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    assert found["training_state_bytes_per_device"] == held(state)
    assert found["parameter_bytes_per_device"] == held(state.params)
    assert found["optimizer_bytes_per_device"] == held(state.opt_state)
    assert found["devices"] == real.size and found["mesh"] == dict(real.shape)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    saved = [(leaf.nbytes, 4) for part in checkpoint.parts_of(state).values() for leaf in jax.tree.leaves(part)]
    assert found["checkpoint_bytes"] == np.sum(saved)
    assert found["flops_per_step"] == flops.train_step_flops(boxed, config)
    assert found["flops_per_step"] == found["tokens_per_step"] * found["flops_per_token"]


def test_state_is_what_a_run_reports():
    config = hybrid()
    found = make_plan(config, 100)
    parts = ("kv_cache_bytes", "recurrent_state_bytes", "bookkeeping_bytes")
    assert sum(found[part] for part in parts) == report.state_bytes(build(config.model, 257), 100)
    assert found["context"] == 100 and make_plan(config)["context"] == 8


def test_a_scan_over_layers_changes_nothing():
    config = hybrid()
    config.model.repeats = 2
    unrolled = make_plan(config)
    config.model.scan_blocks = 1
    scanned = make_plan(config)
    assert scanned.pop("checkpoint_bytes") < unrolled.pop("checkpoint_bytes")  # fewer fingerprints
    assert scanned == unrolled


def test_active_parameters_leave_out_idle_experts():
    config = hybrid()
    experts, top_k, hidden = config.model.moe.experts, config.model.moe.top_k, config.model.moe.hidden
    found = make_plan(config)
    assert found["parameters"] - found["active_parameters"] == (experts - top_k) * 3 * 16 * hidden
    assert found["branches"]["moe"]["blocks"] == found["branches"]["mlp"]["blocks"] == 1
    assert found["branches"]["mamba"]["active_parameters"] == found["branches"]["mamba"]["parameters"]


def test_a_window_bounds_the_cache():
    config = tiny(transformer.get_config())
    config.model.attention.window = 5
    assert make_plan(config, 1000)["kv_cache_bytes"] == make_plan(config, 5)["kv_cache_bytes"]
    assert make_plan(config, 1000)["kv_cache_bytes"] == 4 * 2 * 5 * 2 * 4 * 4  # layers, k and v, slots, heads, channels


def test_dense_links_and_both_directions_have_their_rows():
    config = tiny(mamba.get_config(), dropout=0.0)
    config.model.dense.update(variant="read", bottleneck=4)
    assert make_plan(config)["branches"]["dense"]["parameters"] > 0
    taps = make_plan(tiny(mamba.get_config(), short_conv=3))["branches"]["short_conv"]
    assert taps["parameters"] % 3 == 0 < taps["recurrent_state_bytes"]
    config = tiny(mamba.get_config(), pattern="bi:mamba", input="frames", head="classify")
    found = make_plan(config, dataset=ArrayDataset("classify", which_channel, 8, {"labels": 2}))
    assert set(found["branches"]) == {"bi:mamba", "norms", "frames", "classify"}
    assert found["kv_cache_bytes"] == found["recurrent_state_bytes"] == found["bookkeeping_bytes"] == 0


def test_a_task_gives_the_vocabulary():
    config = mixcon.get_config("mqar")
    rows = data.load(config.data, seq_len=config.seq_len, batch_size=config.batch_size)
    size = -(-rows.tokenizer.vocab_size // 8) * 8
    assert make_plan(config)["branches"]["embedding"]["parameters"] == size * config.model.width


# The command


def call(capsys, *flags):
    """Status, stdout and stderr of train.py --plan."""
    from seqmodels import cli

    config = Path(jamba.__file__).with_name("transformer.py")
    status = cli.run(train.main, train.define, "", ["train.py", f"--config={config}", *flags])
    return status, *capsys.readouterr()


def test_the_command_prints_and_writes_the_plan(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/jamba.py:v0.1", "--plan", f"--context={CONTEXT}"]
    file = tmp_path / "new" / "plan.json"
    done = subprocess.run(
        [*command, f"--out={file}", "--config.platform=tpu"],
        cwd=Path(train.__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "total" in done.stdout and "51,570,323,328 (51.57 B)" in done.stdout and not done.stderr
    assert "cache 4,294,967,296 bytes (4.00 GiB) in bfloat16" in done.stdout
    assert "expert=2 fsdp=8: 16 devices" in done.stdout and "mesh.data=-1 was taken as 1" in done.stdout
    assert json.loads(file.read_text())["kv_cache_bytes"] == 4 * 2**30


def test_nothing_is_said_of_a_mesh_that_is_given(capsys):
    status, out, _ = call(capsys, "--plan", "--config.mesh.data=8", "--config.mesh.tensor=16")
    assert status == 0 and "data=8 tensor=16: 128 devices" in out and "taken as" not in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--context=4"], "--context=4: is for --plan"),
        (["--out=x.json"], "--out=x.json: is for --plan"),
        (["--plan", "--context=0"], "--context=0: must be at least 1"),
        (["--plan", "--context=3000000000"], "--context=3000000000: must be"),
        (["--plan", "--context=many"], "many"),
        (["--plan", "--out=/"], "--out=/: is a folder"),
        (["--plan", "--config.mesh.fsdp=3"], "config.batch_size=8: must be a multiple of 3"),
        (["--plan", "--config.mesh.sequence=3"], "config.seq_len=256: must be a multiple of mesh.sequence=3"),
        (["--plan", "--config.model.head=classify"], "config.model.head='classify': must be 'next_token'"),
        (["--plan", "--config.data.tokenizer=none.json"], "config.data.tokenizer='none.json'"),
        (["--plan", "--config.model.implementation.attention=cudnn", "--config.model.attention.head_dim=6"],
         "config.model.implementation.attention"),
        (["--plan", "--config.model.pattern=attention+moe", "--config.model.moe.top_k=9"], "config.model.moe.top_k=9"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys, flags, words):
    status, _, err = call(capsys, *flags)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_rows_that_do_not_divide_are_an_error_of_the_function():
    with pytest.raises(UserError, match="batch_size"):
        make_plan(hybrid(fsdp=3))
    assert plan.make_plan(hybrid(fsdp=4))["devices"] == 8
