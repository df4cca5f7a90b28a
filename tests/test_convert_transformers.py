"""A tiny random checkpoint of every family through a run directory and back, with its tokenizer.

test_convert.py has what needs no transformers, test_parity_*.py the comparison of the models in depth.
"""

import itertools
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import data
from seqmodels.configs import transformer
from seqmodels.evals.run import load_run
from seqmodels.interop import gguf, pretrained, runs, tokenizer
from seqmodels.interop.huggingface import FAMILIES
from seqmodels.interop.weights import arrays_of
from seqmodels.model import build
from tests.test_convert import TEXT, VOCABULARY, save_tokenizer

pytestmark = pytest.mark.slow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, bos_token_id=0, eos_token_id=1)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, expert_layer_period=2)
MODELS = {
    "mamba": ("Mamba", dict(SIZES, state_size=4)),
    "falcon_mamba": ("FalconMamba", dict(SIZES, state_size=4)),
    "mamba2": ("Mamba2", dict(SIZES, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)),
    "llama": ("Llama", dict(SIZES, **HEADS)),
    "mistral": ("Mistral", dict(SIZES, **HEADS, sliding_window=6)),
    "mixtral": ("Mixtral", dict(SIZES, **HEADS, num_local_experts=3, num_experts_per_tok=2)),
    "jamba": ("Jamba", dict(SIZES, **HEADS, **EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4)),
    "recurrent_gemma": (
        "RecurrentGemma",
        dict(SIZES, **HEADS, attention_window_size=6, block_types=["recurrent", "attention"], pad_token_id=None),
    ),
    "olmo_hybrid": (
        "OlmoHybrid",
        dict(
            SIZES | HEADS,
            **dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=6, linear_value_head_dim=5),
            **dict(pad_token_id=None),
        ),
    ),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            SIZES | HEADS,
            **dict(head_dim=8, full_attention_interval=2, num_experts=2, num_experts_per_tok=2),
            **dict(moe_intermediate_size=8, shared_expert_intermediate_size=8, linear_num_key_heads=2),
            **dict(linear_num_value_heads=2, linear_key_head_dim=6, linear_value_head_dim=5),
        ),
    ),
    "rwkv": ("Rwkv", dict(SIZES, attention_hidden_size=24, intermediate_size=32, context_length=64)),
    "gpt_neox": ("GPTNeoX", dict(SIZES, num_attention_heads=4, intermediate_size=24, rotary_pct=0.5)),
}


def test_every_family_is_here():
    assert MODELS.keys() == FAMILIES.keys() - {"retnet"}  # of fla, which is not installed here: test_interop_retnet.py


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_there_and_back(family, tmp_path):
    name, sizes = MODELS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs")

    runs.import_run(tmp_path / "theirs", tmp_path / "run", runs.config_of(tmp_path / "theirs", tmp_path / "run"))
    run = load_run(tmp_path / "run", text=False)
    words = run.dataset.tokenizer
    ids = [words.separator, *words.encode(TEXT)]
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")(TEXT).input_ids
    hidden, _ = run.model.apply({"params": run.params}, jnp.asarray([ids]))
    ours = np.asarray(run.model.apply({"params": run.params}, hidden, method="logits"))[0]
    want = logits_of(theirs, ids)
    assert np.abs(ours - want).max() < 1e-4 * want.std()

    runs.export_run(tmp_path / "run", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    if family == "mamba2":
        again.config.chunk_size = 4
    for (name, tensor), before in zip(again.state_dict().items(), theirs.state_dict().values(), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), before.numpy(), name)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words(TEXT).input_ids == ids and words.eos_token_id == again.config.eos_token_id == 1


@pytest.mark.filterwarnings("ignore")
def test_tokenizers_of_ours(tmp_path):
    """Bytes, a tokenizer.json without a tokenizer_config.json, and sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "text.txt").write_text("\n".join([TEXT, *TEXT.split()] * 20))
    sizes = dict(vocab_size=60, model_type="bpe", byte_fallback=False, minloglevel=2)
    prefix = str(tmp_path / "words")
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=prefix, **sizes)
    for name in ("bytes", "tokenizer.json", "words.model"):
        ours = data.load_tokenizer(name if name == "bytes" else str(tmp_path / name))
        out = tmp_path / f"out-{name}"
        out.mkdir()
        notes = tokenizer.write(ours, out)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs(TEXT).input_ids == [ours.separator, *ours.encode(TEXT)], name
        assert len(theirs) == ours.vocab_size, name
        assert notes == dict(bos_token_id=theirs.bos_token_id, eos_token_id=theirs.eos_token_id)


@pytest.mark.filterwarnings("ignore")
def test_gguf_equals_transformers(tmp_path):
    """Formats that we read and those that the package reads, in a file that it wrote, and what it and theirs read."""
    pytest.importorskip("accelerate")  # without which theirs reads no such file
    writer_of = pytest.importorskip("gguf")
    kinds = writer_of.GGMLQuantizationType
    random = np.random.default_rng(0)
    width, keys = 256, 128  # K-quants have blocks of 256 numbers
    shapes = {"token_embd": (64, width), "output": (64, width), "output_norm": (width,)}
    for i in range(2):
        square, key = (width, width), (keys, width)
        layer = dict(attn_norm=(width,), ffn_norm=(width,), attn_q=square, attn_output=square, attn_k=key, attn_v=key)
        layer |= dict(ffn_gate=square, ffn_up=square, ffn_down=square)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    formats = [kinds.Q4_0, kinds.Q4_1, kinds.Q5_0, kinds.Q5_1, kinds.Q8_0, kinds.F16, kinds.BF16, kinds.F32]
    written_as_bytes = [kinds.Q2_K, kinds.Q3_K, kinds.Q4_K, kinds.Q5_K, kinds.Q6_K]  # the package does not quantise so
    formats += written_as_bytes
    writer = writer_of.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in dict(
        block_count=2, context_length=64, embedding_length=width, feed_forward_length=width
    ).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e3)
    letters = list("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *letters, "ab", "abc", "Ġ"])
    writer.add_token_types([3, *[1] * 63])
    writer.add_token_merges(["a b", "ab c"])
    for name, token in dict(bos=0, eos=0, unk=0, pad=0).items():
        getattr(writer, f"add_{name}_token_id")(token)
    of_matrices = itertools.cycle(formats)
    for name, shape in shapes.items():
        tensor = random.normal(size=shape).astype(np.float32) * (0.3 if len(shape) > 1 else 1)
        form = next(of_matrices) if len(shape) > 1 else kinds.F32
        if form in written_as_bytes:
            row = width // 256 * writer_of.GGML_QUANT_SIZES[form][1]
            raw = random.integers(0, 256, (shape[0], row), np.uint8) & 0x9F  # so the scales, float16, are small
        else:
            raw = writer_of.quantize(tensor, form)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=form)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()

    fields, params, _ = pretrained.open_model(tmp_path / "tiny.gguf")
    read = {tensor.name: tensor for tensor in writer_of.GGUFReader(tmp_path / "tiny.gguf").tensors}
    for i, ours in itertools.product(range(2), ("up", "gate", "down")):
        tensor = read[f"blk.{i}.ffn_{ours}.weight"]
        want = writer_of.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(params[f"block_{i}"]["mlp"][ours]).T, want)
    used = {tensor.tensor_type for tensor in read.values()}
    assert used == set(formats)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    config = transformer.get_config().model
    config.update(fields)
    model = build(config, 64)
    params = arrays_of(params)
    tokens = random.integers(0, 64, 11)
    hidden, _ = model.apply({"params": params}, jnp.asarray([tokens]))
    ours = np.asarray(model.apply({"params": params}, hidden, method="logits"))[0]
    want = logits_of(theirs.eval(), tokens.tolist())
    assert np.abs(ours - want).max() < 1e-4 * want.std()
    path = gguf.write_tokenizer(tmp_path / "tiny.gguf", tmp_path / "words")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    text = "abcab12"
    assert data.load_tokenizer(str(path)).encode(text) == words(text).input_ids
    assert json.loads((tmp_path / "words" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
