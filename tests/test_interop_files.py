"""Which files of a directory are read, in which order, and what is said about damaged ones.

transformers is the oracle where it is installed: it is given the same directories.
"""

import json
import os
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seqmodels.errors import UserError
from seqmodels.interop.huggingface import FAMILIES, HEAD, from_huggingface
from seqmodels.interop.huggingface import OTHERS as WITHOUT_BRANCH
from seqmodels.interop.pretrained import load, save
from seqmodels.interop.table import read
from seqmodels.interop.weights import head

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CONFIG = dict(model_type="mamba", vocab_size=12, hidden_size=8, num_hidden_layers=2, state_size=4)
LLAMA = dict(
    model_type="llama", vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors_of(config, seed=0):
    """Random tensors of a model of transformers by name."""
    family = FAMILIES[config["model_type"]]
    model = family.config_of(read(config, family.table, config["model_type"]))
    random = np.random.default_rng(seed)
    shapes = {weight.theirs: weight.their_shape for weight in family.weights(model) + head(model)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


TENSORS, OTHERS = tensors_of(CONFIG), tensors_of(CONFIG, seed=1)
HALVES = [dict(list(TENSORS.items())[i::2]) for i in range(2)]
EMBEDDING, LAST = "backbone.embeddings.weight", "backbone.layers.1.mixer.D"


def index_of(halves=HALVES, names=SHARDS):
    return {
        "metadata": {},
        "weight_map": {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half},
    }


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def shard(directory, index=None):
    """Writes the model in two files and their index."""
    for name, half in zip(SHARDS, HALVES, strict=True):
        save_file(half, directory / name, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps(index or index_of()))


def assert_loads(directory, tensors=TENSORS, config=CONFIG):
    want = from_huggingface(tensors, config)
    got = load(directory)
    assert got[0] == want[0]
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])


def single(directory, tensors=TENSORS, name=SAFE):
    save_file(tensors, directory / name, metadata={"format": "pt"})


def beside_consolidated(directory):
    shard(directory)
    single(directory, {"layers.0.attention.wq.weight": np.zeros((8, 8), np.float32)}, "consolidated.safetensors")


def beside_an_old_copy(directory):
    single(directory)
    single(directory, OTHERS, "old_step_100.safetensors")


def sharded_beside_an_old_copy(directory):
    shard(directory)
    single(directory, OTHERS, "model_old.safetensors")


def beside_an_adapter(directory):
    single(directory)
    single(directory, {"base_model.lora_A.weight": np.zeros((2, 8), np.float32)}, "adapter_model.safetensors")


def beside_a_variant(directory):
    single(directory)
    single(directory, OTHERS, "model.fp16.safetensors")


def single_beside_shards(directory):
    """transformers looks for the single file first."""
    shard(directory)
    single(directory, {**TENSORS, LAST: TENSORS[LAST] + 1})


def single_file_with_an_index(directory):
    single(directory)
    (directory / INDEX).write_text(json.dumps(index_of([TENSORS], [SAFE])))


def named_in_the_config(directory):
    single(directory, OTHERS)
    single(directory, TENSORS, "best.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, "transformers_weights": "best.safetensors"}))


def without_prefix(directory):
    """As save_pretrained of a model without a head writes it."""
    single(directory, {name.removeprefix("backbone."): tensor for name, tensor in TENSORS.items()})


def in_a_folder(directory):
    shard(directory, index_of(names=[f"part/{name}" for name in SHARDS]))
    (directory / "part").mkdir()
    for name in SHARDS:
        shutil.move(directory / name, directory / "part" / name)


def linked(directory):
    """As in the cache of the hub."""
    (directory / "blobs").mkdir()
    shard(directory)
    for name in SHARDS:
        shutil.move(directory / name, directory / "blobs" / name)
        (directory / name).symlink_to(directory / "blobs" / name)


LAYOUTS = [
    single,
    shard,
    beside_consolidated,
    beside_an_old_copy,
    sharded_beside_an_old_copy,
    beside_an_adapter,
    beside_a_variant,
    single_beside_shards,
    single_file_with_an_index,
    named_in_the_config,
    without_prefix,
    in_a_folder,
    linked,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_files_that_transformers_reads(layout, directory):
    layout(directory)
    tensors = {**TENSORS, LAST: TENSORS[LAST] + 1} if layout is single_beside_shards else TENSORS
    config = json.loads((directory / "config.json").read_text())
    assert_loads(directory, tensors, config)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_transformers_reads_the_same_files(layout, directory):
    transformers = pytest.importorskip("transformers")
    layout(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tensors = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
    assert_loads(directory, tensors, json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_torch(directory, sharded):
    torch = pytest.importorskip("torch")
    halves = HALVES if sharded else [TENSORS]
    names = ("pytorch_model-1.bin", "pytorch_model-2.bin") if sharded else ("pytorch_model.bin",)
    for name, half in zip(names, halves, strict=True):
        torch.save({tensor: torch.from_numpy(array) for tensor, array in half.items()}, directory / name)
    if sharded:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index_of(halves, names)))
    assert_loads(directory)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_stored_dtypes(directory, dtype):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    stored = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    single(directory, stored)
    assert_loads(directory, {name: tensor.astype(np.float32) for name, tensor in stored.items()})


def test_a_home_directory(directory, monkeypatch):
    single(directory)
    monkeypatch.setenv("HOME", str(directory.parent))
    assert load(f"~/{directory.name}")[0]["width"] == 8


def test_tied_head_and_buffers(tmp_path):
    tensors = tensors_of({**LLAMA, "tie_word_embeddings": True})
    config = {**LLAMA, "tie_word_embeddings": True}
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        HEAD: tensors["model.embed_tokens.weight"].copy(),
    }
    assert from_huggingface({**tensors, **more}, config)[0] == from_huggingface(tensors, config)[0]
    head_only = {HEAD if name == "model.embed_tokens.weight" else name: tensor for name, tensor in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(head_only, config), from_huggingface(tensors, config))
    with pytest.raises(UserError, match=rf"missing {HEAD}$"):
        from_huggingface(tensors, LLAMA)
    with pytest.raises(UserError, match=r"missing model\.embed_tokens\.weight$"):
        from_huggingface(head_only, LLAMA)


def write(name, content):
    def do(directory):
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


def header(entries, data):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def torn(directory):
    single(directory)
    content = (directory / SAFE).read_bytes()
    (directory / SAFE).write_bytes(content[: len(content) // 2])


def with_index(change):
    def do(directory):
        index = index_of()
        shard(directory, {**index, "weight_map": {**index["weight_map"], **change}})

    return do


def index_with_a_name_twice(directory):
    shard(directory)
    entry = f'"{EMBEDDING}": "{SHARDS[1]}", "weight_map": {{'
    text = (
        (directory / INDEX).read_text().replace('"weight_map": {', '"weight_map": {' + entry.split(", ")[0] + ", ", 1)
    )
    (directory / INDEX).write_text(text)


def tensor_in_two_files(directory):
    shard(directory)
    save_file({**HALVES[1], EMBEDDING: OTHERS[EMBEDDING]}, directory / SHARDS[1])


def without_a_shard(directory):
    shard(directory)
    (directory / SHARDS[1]).unlink()


def only(name):
    return lambda directory: single(directory, TENSORS, name)


def tensor(name, dtype):
    return lambda directory: single(directory, {**TENSORS, name: TENSORS[name].astype(dtype)})


F8 = header({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"\0\0")
DAMAGED = {
    "no weights": (lambda directory: None, r"neither \*\.safetensors nor pytorch_model\.bin"),
    "only a variant": (only("model.fp16.safetensors"), r"has model\.fp16\.safetensors, but none of model\.safetensors"),
    "only consolidated": (only("consolidated.safetensors"), r"has consolidated\.safetensors, but none of"),
    "empty": (write(SAFE, ""), rf"{SAFE} cannot be read"),
    "torn": (torn, rf"{SAFE} cannot be read"),
    "damaged header": (write(SAFE, header({"a": 1}, b"")), rf"{SAFE} cannot be read"),
    "Git LFS": (write(SAFE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "dtype that numpy lacks": (write(SAFE, F8), rf"{SAFE} has tensors of a dtype that cannot be converted"),
    "quantised": (tensor(LAST, np.int8), rf"{LAST} is int8; allowed: float32"),
    "not torch": (write("pytorch_model.bin", "torn"), r"pytorch_model\.bin (cannot be read|needs torch)"),
    "index is not JSON": (write(INDEX, "{"), rf"{INDEX} cannot be read: .*line 1"),
    "index is a list": (write(INDEX, "[]"), rf"{INDEX} has a list"),
    "index without a map": (write(INDEX, "{}"), rf"{INDEX} has no weight_map"),
    "index of numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), rf"{INDEX} has no weight_map"),
    "missing shard": (without_a_shard, rf"{SHARDS[1]} is missing; {INDEX} names it"),
    "missing tensor": (with_index({"new": SHARDS[0]}), rf"{SHARDS[0]} has no tensor new"),
    "outside": (with_index({LAST: "../other.safetensors"}), r"names the file '\.\./other\.safetensors'"),
    "absolute": (with_index({LAST: "/etc/other.safetensors"}), r"names the file '/etc/other\.safetensors'"),
    "name twice": (index_with_a_name_twice, rf"{INDEX} has '{EMBEDDING}' twice"),
    "tensor in two files": (tensor_in_two_files, rf"{SHARDS[0]} and {SHARDS[1]} have different tensors {EMBEDDING}"),
    "config is not JSON": (write("config.json", "{'a': 1}"), r"config\.json cannot be read: .*line 1"),
    "config is not UTF-8": (write("config.json", b"\xff"), r"config\.json cannot be read"),
    "config is a list": (write("config.json", "[1]"), r"config\.json has a list; allowed: a JSON object"),
    "file outside of the directory": (
        write("config.json", json.dumps({**CONFIG, "transformers_weights": "../model.safetensors"})),
        r"config\.json names the file '\.\./model\.safetensors'",
    ),
    "file is a number": (
        write("config.json", json.dumps({**CONFIG, "transformers_weights": 3})),
        "transformers_weights is 3; allowed",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named_in_one_line(directory, damage, message):
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [None, "gpt2", ["mamba"], 3])
def test_other_models_are_named(kind):
    families = "mamba, mamba2, falcon_mamba, llama, mistral, mixtral, jamba, gpt_neox, olmo_hybrid, qwen3_next, "
    families += "recurrent_gemma, retnet, rwkv"
    with pytest.raises(UserError, match=rf"model_type is .*; allowed: {families}$"):
        from_huggingface(TENSORS, {**CONFIG, "model_type": kind})


@pytest.mark.parametrize("kind", WITHOUT_BRANCH)
def test_models_without_a_branch_are_refused_by_name(kind):
    with pytest.raises(UserError, match=f"model_type '{kind}' cannot be converted: .*{WITHOUT_BRANCH[kind][-8:]}$"):
        from_huggingface(TENSORS, {**CONFIG, "model_type": kind})


def test_more_layers_than_tensors():
    with pytest.raises(UserError, match=f"only {len(TENSORS)} tensors; the config asks for 1000000000000 layers"):
        from_huggingface(TENSORS, {**CONFIG, "num_hidden_layers": 10**12})


@pytest.mark.parametrize("place", ["missing", "config.json"])
def test_no_directory(directory, place):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(directory / place)


@pytest.mark.parametrize("place", ["a" * 300, "~nobody-has-this-name/model"])
def test_places_that_cannot_be(place):
    with pytest.raises(UserError, match="cannot be read"):
        load(place)


def exported(directory):
    fields, params = from_huggingface(TENSORS, CONFIG)
    return params, {**fields, "dense": {"variant": "none"}}


def test_export_and_import_change_no_bit(tmp_path):
    """Our parameters, through a file and back; then the file again."""
    params, model = exported(tmp_path)
    save(tmp_path / "a", params, model)
    fields, again = load(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    save(tmp_path / "b", again, {**fields, "dense": {"variant": "none"}})
    for name in ("config.json", SAFE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first = load_file(tmp_path / "a" / SAFE)
    assert first.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(first[name], tensor)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.json", SAFE]


def test_export_replaces_a_model_but_no_run(tmp_path):
    params, model = exported(tmp_path)
    save(tmp_path, params, model)
    save(tmp_path, params, model)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"width": 8}, "steps": 5}))
    with pytest.raises(UserError, match=r"config\.json is not of a transformers model; choose another directory"):
        save(tmp_path, params, model)


def test_export_where_nothing_can_be_written(tmp_path):
    params, model = exported(tmp_path)
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"cannot be written"):
            save(tmp_path / place, params, model)
