"""GGUF files written here by hand: their layout, formats of numbers, tokenizer, and what is said about damaged ones.

tests/test_convert_transformers.py compares with the package gguf and with transformers, where these are installed.
"""

import struct
import sys

import numpy as np
import pytest

import seqmodels as sq
from seqmodels import data
from seqmodels.errors import UserError
from seqmodels.interop import gguf, pretrained

WIDTH, HEADS, KEYS, HIDDEN, VOCABULARY = 8, 2, 1, 12, 6
SIZES = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEYS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e3,
    "llama.rope.dimension_count": WIDTH // HEADS,
}
WORDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "c", "ab", "</s>"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 5,
    "tokenizer.ggml.add_bos_token": True,
}
KEY = WIDTH // HEADS * KEYS
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
    "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (KEY, WIDTH), "blk.0.attn_v": (KEY, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (HIDDEN, WIDTH), "blk.0.ffn_up": (HIDDEN, WIDTH),
    "blk.0.ffn_down": (WIDTH, HIDDEN),
}  # fmt: skip
TENSORS = {
    f"{name}.weight": np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(x):
    if isinstance(x, bool):
        return 7, struct.pack("<?", x)
    if isinstance(x, str):
        return 8, text(x)
    if isinstance(x, list):
        kinds, raws = zip(*map(value, x), strict=True)
        return 9, struct.pack("<IQ", kinds[0], len(x)) + b"".join(raws)
    return (4, struct.pack("<I", x)) if isinstance(x, int) else (6, struct.pack("<f", x))


def write(path, fields=None, tensors=TENSORS, kind=0, version=3):
    """A file with these fields and float32 tensors, whose format is called `kind`."""
    fields = {**SIZES, **WORDS, **(fields or {})}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    for name, x in fields.items():
        number, raw = value(x)
        head += text(name) + struct.pack("<I", number) + raw
    body = b""
    for name, tensor in tensors.items():
        body += b"\0" * (-len(body) % 32)
        shape = tensor.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += tensor.tobytes()
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def test_fields_and_tensors(tmp_path):
    fields, params, theirs = pretrained.open_model(write(tmp_path / "tiny.gguf"))
    assert fields == dict(
        pattern="attention+mlp",
        width=WIDTH,
        repeats=1,
        vocab_size=VOCABULARY,
        norm_eps=1e-5,  # not 9.999999747378752e-06
        tie_embeddings=True,
        attention=dict(heads=HEADS, kv_heads=KEYS, head_dim=4, rope_theta=5e3, window=0),
        mlp=dict(hidden=HIDDEN, activation="silu"),
    )
    assert theirs["max_position_embeddings"] == 64
    block = params["block_0"]
    np.testing.assert_array_equal(block["mlp"]["up"], TENSORS["blk.0.ffn_up.weight"].T)
    np.testing.assert_array_equal(params["embedding"], TENSORS["token_embd.weight"])
    query = TENSORS["blk.0.attn_q.weight"].reshape(HEADS, 4, WIDTH)
    turned = query[:, [0, 2, 1, 3]]  # pairs (0, 1), (2, 3) of llama.cpp are our pairs (0, 2), (1, 3)
    np.testing.assert_array_equal(block["mixer"]["query"], np.moveaxis(turned, 2, 0))


@pytest.mark.parametrize(
    "kind, raw, want",
    [
        (8, [np.float16(0.5), np.arange(-16, 16, dtype=np.int8)], 0.5 * np.arange(-16, 16)),
        (2, [np.float16(0.5), np.arange(16, dtype=np.uint8) * 16], 0.5 * np.concatenate([[-8] * 16, np.arange(-8, 8)])),
        (3, [np.float16(2), np.float16(-1), np.arange(16, dtype=np.uint8)], [*(2.0 * np.arange(16) - 1), *[-1] * 16]),
        (6, [np.float16(1), np.uint32(1 << 31 | 1), np.zeros(16, np.uint8)], [0, *[-16] * 30, 0]),
        (7, [np.float16(1), np.float16(3), np.uint32(2), np.full(16, 0x21, np.uint8)], [4, 20, *[4] * 14, *[5] * 16]),
    ],
)
def test_quantised_blocks(kind, raw, want):
    block = np.frombuffer(b"".join(part.tobytes() for part in raw), np.uint8)[None]
    assert block.shape[1] == gguf.FORMATS[kind].size
    np.testing.assert_array_equal(gguf.FORMATS[kind].read(block)[0], want)


def test_the_package_for_k_quants_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    message = r"tiny.gguf: token_embd.weight has the format number 14 of ggml, which needs the .*: pip install gguf$"
    with pytest.raises(UserError, match=message):
        pretrained.open_model(write(tmp_path / "tiny.gguf", kind=14))


def test_tokenizer(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    assert gguf.begins_with(path) == "<s>"
    made = data.load_tokenizer(str(gguf.write_tokenizer(path, tmp_path / "words")), "<s>")
    assert made.encode("abc") == [4, 3] and made.separator == 0 and made.vocab_size == VOCABULARY


def test_from_python(tmp_path):
    run = sq.from_pretrained(write(tmp_path / "tiny.gguf"))
    assert run.encode("abc") == [0, 4, 3] and run.logits("abc").shape == (3, VOCABULARY)


def cut(path):
    path.write_bytes(write(path).read_bytes()[:-100])


def without_magic(path):
    path.write_bytes(b"XXXX" + write(path).read_bytes()[4:])


def in_the_header(path):
    path.write_bytes(write(path).read_bytes()[:60])


with_factors = {**TENSORS, "rope_freqs.weight": np.ones(2, np.float32)}
MISTAKES = {
    "no such file": (lambda path: None, "cannot be read: No such file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "cut": (cut, r"blk\.0\.ffn_down\.weight of shape \(8, 12\) is not whole"),
    "cut in the header": (in_the_header, "cannot be read"),
    "another file": (without_magic, "is no GGUF file"),
    "version": (lambda path: write(path, version=1), "is of version 1 of GGUF; allowed: 2 and 3"),
    "format": (lambda path: write(path, kind=99), "embd.weight has the format number 99 of ggml, which"),
    "architecture": (
        lambda path: write(path, {"general.architecture": "qwen2"}),
        "general.architecture is 'qwen2'; only 'llama' can be converted",
    ),
    "experts": (lambda path: write(path, {"llama.expert_count": 8}), "llama.expert_count is 8; the import does not"),
    "scaling": (
        lambda path: write(path, {"llama.rope.scaling.type": "yarn"}),
        "llama.rope.scaling.type is 'yarn'; the import does not",
    ),
    "part of a head": (
        lambda path: write(path, {"llama.rope.dimension_count": 2}),
        "llama.rope.dimension_count is 2; only 4, all of a head",
    ),
    "tensor": (lambda path: write(path, tensors=with_factors), "the tensor rope_freqs.weight cannot be converted"),
}


@pytest.mark.parametrize("damage, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(damage, message, tmp_path):
    damage(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=message) as error:
        pretrained.open_model(tmp_path / "tiny.gguf")
    assert "\n" not in str(error.value) and "tiny.gguf" in str(error.value)


@pytest.mark.parametrize("field, wrong", [("model", "llama"), ("pre", "qwen2")])
def test_other_tokenizers_are_refused(field, wrong, tmp_path):
    path = write(tmp_path / "tiny.gguf", {f"tokenizer.ggml.{field}": wrong})
    with pytest.raises(UserError, match=rf"{field} is '{wrong}'; only .* can be converted; name another with"):
        gguf.write_tokenizer(path, tmp_path / "words")
