"""Llama models in GGUF files, as llama.cpp has them: one file holds fields, tokenizer and weights.

The fields become those of a config.json and the tensors get the names of transformers, so that the rest of the
import is that of `llama.py`. Quantised weights become float32 when they are read: those in blocks of 32 numbers (Q4_0
to Q8_0) here, all others (the K-quants Q2_K to Q6_K, IQ4_XS, ...) by the package gguf, which llama.cpp's authors
publish. llama.cpp rotates neighbouring channels, so rows of queries and keys are in another order.
"""

import dataclasses
import functools
import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.errors import UserError
from seqmodels.interop.files import FileTensor

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Names of weights, {} is the layer; and whether the tensor's rows are those of pairs of channels.
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Fields "llama.*" and what they are called in a config.json
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
FOLLOWING = ("vocab_size", "rope.dimension_count", "attention.value_length")  # which follow from these
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Quantised blocks: [blocks, bytes] uint8 to [blocks, 32] float32


def half(block: np.ndarray, place: int) -> np.ndarray:
    """The float16 at a place of each block, [blocks, 1] float32."""
    return block[:, place : place + 2].copy().view(np.float16).astype(np.float32)


def nibbles(block: np.ndarray, place: int) -> np.ndarray:
    """[blocks, 32]: the lower four bits of 16 bytes, then the upper ones."""
    packed = block[:, place : place + 16]
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def fives(block: np.ndarray, place: int) -> np.ndarray:
    """[blocks, 32] numbers of five bits, whose highest bits come first, four bytes of them."""
    high = np.unpackbits(block[:, place : place + 4], axis=1, bitorder="little")
    return nibbles(block, place + 4) | high << 4


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers are stored: `size` bytes for each block of `numbers`.

    Attributes:
        dtype: of the array that is read.
        read: [blocks, size] uint8 to [blocks, numbers].
    """

    dtype: str
    numbers: int
    size: int
    read: Callable[[np.ndarray], np.ndarray]


def plain(dtype: str, size: int) -> Format:
    """Numbers as they are."""

    def read(block: np.ndarray) -> np.ndarray:
        import ml_dtypes  # noqa: F401  gives numpy its bfloat16

        return np.ascontiguousarray(block).view(np.dtype(dtype))

    return Format(dtype, 1, size, read)


def quantised(size: int, read: Callable[[np.ndarray], np.ndarray]) -> Format:
    """Blocks of 32 numbers."""
    return Format("float32", 32, size, read)


FORMATS = {
    0: plain("float32", 4),
    1: plain("float16", 2),
    30: plain("bfloat16", 2),
    28: plain("float64", 8),
    2: quantised(18, lambda b: half(b, 0) * (nibbles(b, 2).astype(np.int8) - 8)),  # Q4_0
    3: quantised(20, lambda b: half(b, 0) * nibbles(b, 4) + half(b, 2)),  # Q4_1
    6: quantised(22, lambda b: half(b, 0) * (fives(b, 2).astype(np.int8) - 16)),  # Q5_0
    7: quantised(24, lambda b: half(b, 0) * fives(b, 4) + half(b, 2)),  # Q5_1
    8: quantised(34, lambda b: half(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8)),  # Q8_0
}


def _of_package(named: str, kind: int) -> Format:
    """A format that the package gguf reads. `named`: the file and the tensor, for errors."""
    that = f"{named} has the format number {kind} of ggml"
    try:
        import gguf
    except ImportError:
        raise UserError(f"{that}, which needs the package gguf: pip install gguf") from None
    try:
        known = gguf.GGMLQuantizationType(kind)
        numbers, size = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        raise UserError(f"{that}, which the package gguf does not read") from None
    return Format("float32", numbers, size, lambda block: gguf.dequantize(block, known))


class Reader:
    """Reads the values of a file one after another."""

    def __init__(self, content: Any) -> None:
        self.content, self.place = content, 0

    def scalar(self, letter: str) -> Any:
        """A number; `letter` as in `struct`."""
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.place)
        self.place += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        """A string with its length before it."""
        length = self.scalar("Q")
        raw = self.content[self.place : self.place + length]
        if len(raw) < length:
            raise struct.error(f"a text of {length} bytes beyond the end")
        self.place += length
        return raw.decode("utf-8")

    def value(self, kind: int | None = None) -> Any:
        """A value with its kind before it, or of a kind."""
        kind = self.scalar("I") if kind is None else kind
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise struct.error(f"a value of the unknown kind {kind}")
        return self.scalar(SCALARS[kind])


def is_gguf(path: Path) -> bool:
    """Whether a path is that of such a file, by its ending."""
    return path.suffix == ".gguf"


@functools.lru_cache(maxsize=1)  # the tokenizer alone takes a second
def read(path: Path) -> tuple[dict[str, Any], dict[str, FileTensor]]:
    """Fields and tensors of a file, under its own names.

    Raises:
        UserError: the file is damaged or of another version, or has weights in a format that is not known.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (struct.error, UnicodeDecodeError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"{path} cannot be read: {error}") from None


def _parse(path: Path, content: Any) -> tuple[dict[str, Any], dict[str, FileTensor]]:
    reader = Reader(content)
    if content[:4] != MAGIC:
        raise UserError(f"{path} is no GGUF file")
    reader.place = 4
    if (version := reader.scalar("I")) not in (2, 3):
        raise UserError(f"{path} is of version {version} of GGUF; allowed: 2 and 3")
    tensors, count = reader.scalar("Q"), reader.scalar("Q")
    fields = {reader.text(): reader.value() for _ in range(count)}
    infos = []
    for _ in range(tensors):
        name, axes = reader.text(), reader.scalar("I")
        shape = tuple(reader.scalar("Q") for _ in range(axes))[::-1]  # theirs begins with the axis that is contiguous
        infos.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = fields.get("general.alignment", 32)
    start = -(-reader.place // alignment) * alignment
    return fields, {
        name: _tensor(f"{path}: {name}", content, shape, kind, start + offset) for name, shape, kind, offset in infos
    }


def _tensor(named: str, content: Any, shape: tuple[int, ...], kind: int, begin: int) -> FileTensor:
    form = FORMATS[kind] if kind in FORMATS else _of_package(named, kind)
    blocks = math.prod(shape) // form.numbers
    end = begin + blocks * form.size
    if not shape or shape[-1] % form.numbers or end > len(content):
        raise UserError(f"{named} of shape {shape} is not whole; the file is cut off or damaged")

    def whole() -> np.ndarray:
        block = np.frombuffer(content, np.uint8, end - begin, begin).reshape(blocks, form.size)
        return form.read(block).reshape(shape)

    return FileTensor(shape, form.dtype, whole)


def as_llama(path: Path) -> tuple[dict[str, FileTensor], dict[str, Any]]:
    """Tensors and config.json of the same model in transformers.

    Raises:
        UserError: another architecture, or fields or tensors that such a model does not have.
    """
    fields, tensors = read(path)
    if (kind := fields.get("general.architecture")) != "llama":
        raise UserError(f"{path}: general.architecture is {kind!r}; only 'llama' can be converted")
    config: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5}
    for name, value in fields.items():
        if (field := name.removeprefix("llama.")) == name:
            continue
        if field in FIELDS:  # float32 in the file; the shortest number that rounds to it was meant
            config[FIELDS[field]] = float(str(np.float32(value))) if isinstance(value, float) else value
        elif field not in FOLLOWING and value not in ("none", 0, False):
            raise UserError(f"{path}: {name} is {value!r}; the import does not know this field")
    names = {name: _renamed(path, name) for name in tensors}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["vocab_size"] = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0
    heads = config.get("num_attention_heads", 1)
    counts = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    _check_rotary(path, fields, config)
    return {
        names[name]: _in_halves(tensor, counts[part]) if (part := name.split(".")[-2]) in counts else tensor
        for name, tensor in tensors.items()
    }, config


def _check_rotary(path: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    width, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
    channels = config.get("head_dim", width // heads if isinstance(width, int) and heads else 0)
    for name in ("rope.dimension_count", "attention.value_length"):
        value = fields.get(f"llama.{name}", channels)
        if value != channels:
            raise UserError(f"{path}: llama.{name} is {value!r}; only {channels}, all of a head, can be converted")


def _renamed(path: Path, name: str) -> str:
    stem, _, ending = name.rpartition(".")
    layer = stem.split(".")
    if ending == "weight" and stem in NAMES:
        return f"{NAMES[stem]}.weight"
    if ending == "weight" and len(layer) == 3 and layer[0] == "blk" and layer[1].isdecimal() and layer[2] in LAYER:
        return f"model.layers.{int(layer[1])}.{LAYER[layer[2]]}.weight"
    advice = "take the model's safetensors" if stem == "rope_freqs" else "a Llama of transformers has no such tensor"
    raise UserError(f"{path}: the tensor {name} cannot be converted; {advice}")


def _in_halves(tensor: FileTensor, heads: int) -> FileTensor:
    """Rows of queries or keys with the first channels of all pairs of a head, then the second ones."""

    def whole() -> np.ndarray:
        rows, columns = tensor.shape
        pairs = tensor.read().reshape(heads, rows // heads // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)

    if tensor.ndim != 2 or tensor.shape[0] % (2 * heads):  # the import says what shape it should have
        return tensor
    return dataclasses.replace(tensor, read=whole)


# Tokenizer


def begins_with(path: Path) -> str:
    """The token that the tokenizer of a file puts before each text; "" if there is none."""
    fields, _ = read(path)
    prefix, tokens = "tokenizer.ggml.", fields.get("tokenizer.ggml.tokens", [])
    number = fields.get(f"{prefix}bos_token_id")
    return tokens[number] if fields.get(f"{prefix}add_bos_token") and number is not None else ""


def write_tokenizer(path: Path, folder: Path) -> Path:
    """Write the tokenizer of a file as tokenizer.json and tokenizer_config.json; returns the first.

    Raises:
        UserError: it is none of byte pairs, or splits text in a way that is not known.
    """
    import tokenizers as tk

    fields, _ = read(path)
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    digits = tk.pre_tokenizers.Digits(individual_digits=True)
    splits: dict[Any, list[Any]] = {
        "gpt-2": [tk.pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [digits, tk.pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [
            tk.pre_tokenizers.Split(tk.Regex(LLAMA3_WORDS), "isolated"),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    for name, allowed in (("model", ["gpt2"]), ("pre", list(splits))):
        if (value := ggml.get(name)) not in allowed:
            advice = f"only {', '.join(map(repr, allowed))} can be converted; name another with --config.data.tokenizer"
            raise UserError(f"{path}: tokenizer.ggml.{name} is {value!r}; {advice}")
    tokens, kinds = ggml["tokens"], ggml.get("token_type", [])
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    made = tk.Tokenizer(tk.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = tk.pre_tokenizers.Sequence(splits[ggml["pre"]])
    made.decoder = tk.decoders.ByteLevel()
    made.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=False) if kind == 3])
    made.add_tokens([token for token, kind in zip(tokens, kinds, strict=False) if kind == 4])
    if first := begins_with(path):
        single = dict(single=f"{first} $A", special_tokens=[(first, made.token_to_id(first))])
        made.post_processor = tk.processors.TemplateProcessing(**single)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    special = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    named = {theirs: tokens[ggml[f"{name}_token_id"]] for name, theirs in special.items() if f"{name}_token_id" in ggml}
    if template := fields.get("tokenizer.chat_template"):
        named["chat_template"] = template
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **named, clean_up_tokenization_spaces=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder / "tokenizer.json"
