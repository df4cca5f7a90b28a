"""Tokenizers: bytes, a sentencepiece model, or a Hugging Face tokenizer.json. All read from local files."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from seqmodels.data.sizes import sizes_of
from seqmodels.errors import UserError

# Names of the token that ends (or else begins) a text, in order of preference.
SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "[BOS]",
)


class Tokenizer:
    """Base class of tokenizers.

    Attributes:
      name: "bytes" or the path of the file.
      fingerprint: str that changes whenever an encoding may change.
      vocab_size: number of ids, the separator included.
      separator: id at the beginning of each document. No text is encoded to it. -1: there is none.
    """

    name: str
    fingerprint: str
    vocab_size: int
    separator: int

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without separator."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of several texts, each `[tokens]` of `dtype`."""
        raise NotImplementedError

    def encode_with_sizes(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, and of each text the bytes of UTF-8 that its tokens stand for.

        Returns: (ids [tokens], sizes [tokens] int64) of each text, by the rule of `seqmodels.data.sizes`.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a sequence of ids. Separators, and ids that the model's padded vocabulary adds, are left out."""
        raise NotImplementedError

    def id_of(self, token: str) -> int | None:
        """Id of a token as it is written in the tokenizer's file; None: there is no such token."""
        return None

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds every id."""
        return np.min_scalar_type(max(self.vocab_size - 1, 256))


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and the separator as id 256."""

    name = fingerprint = "bytes"
    vocab_size, separator = 257, 256

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_with_sizes(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, np.ones(len(ids), np.int64)) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not valid UTF-8, such as half a character at either end, are left out."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="ignore")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`. The separator is its eos; without eos its bos; without both a new id at the end.

    Args:
      separator: the piece that is the separator instead; "": as above.
    """

    def __init__(self, path: Path, separator: str = "") -> None:
        import sentencepiece

        content = _read(path)
        self.name, self.fingerprint = str(path), _hash(content, separator)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError) as error:
            raise _unreadable(path, "a sentencepiece model") from error
        pieces = self._model.vocab_size()
        ids = [i for i in (self._model.eos_id(), self._model.bos_id()) if i >= 0]
        self.separator = ids[0] if ids else pieces
        if separator:
            self.separator = _known(self.id_of(separator), separator, path)
        self.vocab_size = max(pieces, self.separator + 1)
        self._pieces = pieces

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, self.dtype) for ids in self._model.EncodeAsIds(texts)]

    def encode_with_sizes(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = self._model.EncodeAsOffsetMapping(texts, return_bytes=True)
        result = []
        for text, encoding in zip(texts, found, strict=True):
            begins, ends = np.array(encoding["offsets"], np.int64).reshape(-1, 2).T
            sizes = sizes_of(begins, ends, len(text.encode("utf-8")))
            result.append((np.asarray(encoding["ids"], self.dtype), sizes))
        return result

    def id_of(self, token: str) -> int | None:
        number = self._model.piece_to_id(token)  # that of unknown pieces, if it is none
        return number if self._model.id_to_piece(number) == token else None

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.DecodeIds([i for i in map(int, ids) if i < self._pieces and i != self.separator])


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library. Its separator is the first of SEPARATORS, else an added id.

    Args:
      separator: the token that is the separator instead; "": as above.
    """

    def __init__(self, path: Path, separator: str = "") -> None:
        import tokenizers

        content = _read(path)
        self.name, self.fingerprint = str(path), _hash(content, separator)
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise _unreadable(path, "a Hugging Face tokenizer.json") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.post_processor = None  # it would add special tokens, and cut white space off the tokens' places
        self._model.encode_special_tokens = True  # a separator written out in a text is text
        self._ids = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        known = [i for i in map(self.id_of, SEPARATORS) if i is not None]
        self.separator = known[0] if known else self._ids
        if separator:
            self.separator = _known(self.id_of(separator), separator, path)
        self.vocab_size = max(self._ids, self.separator + 1)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, self.dtype) for encoding in encodings]

    def encode_with_sizes(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        result = []
        encodings = self._model.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            places = _byte_places(text)  # the library counts characters
            begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            sizes = sizes_of(places[begins], places[ends], int(places[-1]))
            result.append((np.asarray(encoding.ids, self.dtype), sizes))
        return result

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in map(int, ids) if i < self._ids and i != self.separator])


def load_tokenizer(name: str, separator: str = "") -> Tokenizer:
    """The tokenizer that `config.data.tokenizer` names.

    Args:
      name: "bytes"; the path of a sentencepiece `.model` or a Hugging Face `tokenizer.json`, or of a folder with one of
        them, as `save_pretrained` writes; or the name of a repository of the Hugging Face Hub, such as "gpt2".
      separator: `config.data.separator`, the token at the beginning of each document; "": see the classes.

    Raises:
      UserError: no such file or name, or a file whose contents do not match its name.
    """
    if name == "bytes":
        if separator:
            raise UserError(f"config.data.separator={separator!r}: must be '' with config.data.tokenizer='bytes'")
        return ByteTokenizer()
    path = file_of(name)
    return KINDS[path.suffix](path, separator)


KINDS: dict[str, type[SentencePieceTokenizer | HuggingFaceTokenizer]] = {
    ".model": SentencePieceTokenizer,
    ".json": HuggingFaceTokenizer,
}
FILES = ("tokenizer.json", "tokenizer.model")  # in a folder or a repository
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def in_folder(folder: Path) -> Path | None:
    """The file of a tokenizer in a folder, as `save_pretrained` writes it; None: there is none."""
    return next((folder / file for file in FILES if (folder / file).is_file()), None)


def file_of(name: str) -> Path:
    """The file of a tokenizer: of that name, in the folder of that name, or of the repository, which is fetched once.

    Raises: UserError where there is none.
    """
    path = Path(name).expanduser()
    if os.path.isdir(path):  # False too for a name that is too long
        if found := in_folder(path):
            return found
        raise UserError(f"config.data.tokenizer={name!r}: the folder has neither {' nor '.join(FILES)}")
    if path.suffix in KINDS:
        return path
    if os.path.exists(path) or not HUB_NAME.fullmatch(name):
        raise UserError(
            f"config.data.tokenizer={name!r}: must be 'bytes', the path of a sentencepiece .model or a Hugging Face "
            "tokenizer.json, a folder with one, or a name on the Hugging Face Hub"
        )
    import huggingface_hub  # comes with tokenizers

    reason = ""
    for file in FILES:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file))
        except Exception as error:  # of many types: no network, no such repository, no right to read it
            reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0][:150]
    raise UserError(
        f"config.data.tokenizer={name!r}: no such file or folder, and the Hugging Face Hub does not give it: {reason}"
    )


def _byte_places(text: str) -> np.ndarray:
    """[characters + 1] int64: at which byte of the UTF-8 each character begins, and the bytes of all."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"config.data.tokenizer={str(path)!r}: cannot be read ({error.strerror})") from error


def _unreadable(path: Path, kind: str) -> UserError:
    return UserError(f"config.data.tokenizer={str(path)!r}: is not {kind}")


def _known(number: int | None, separator: str, path: Path) -> int:
    if number is None:
        raise UserError(f"config.data.separator={separator!r}: must be '' or a token of {path}")
    return number


def _hash(content: bytes, separator: str) -> str:
    return hashlib.sha256(content + (b"\0" + separator.encode() if separator else b"")).hexdigest()
