"""The tokenizer of a model, which goes along with its weights in both directions."""

import json
import shutil
from pathlib import Path
from typing import Any

from seqmodels.data.tokenizer import FILES, SEPARATORS, Tokenizer, in_folder
from seqmodels.errors import UserError
from seqmodels.interop.files import read_json

(FILE, MODEL), CONFIG = FILES, "tokenizer_config.json"
# What transformers writes beside them: they are copied as they are, as is what it reads for generation.
BESIDE = (
    *(CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json"),
)


def find(directory: Path) -> Path:
    """The file of the tokenizer in a directory of transformers.

    Raises:
        UserError: there is none that `config.data.tokenizer` can name.
    """
    if path := in_folder(directory):
        return path
    raise UserError(
        f"{directory} has neither {FILE} nor {MODEL}; name one with --config.data.tokenizer (a path, or bytes)"
    )


def begins_with(path: Path) -> str:
    """The token that transformers puts before each text, such as <s>, and "" if there is none or more than one."""
    if path.name == MODEL:
        config = read_json(path.with_name(CONFIG)) if path.with_name(CONFIG).is_file() else {}
        return text_of(config.get("bos_token")) if config.get("add_bos_token") else ""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    whole, bare = (tokenizer.encode("a", add_special_tokens=special).tokens for special in (True, False))
    return whole[0] if len(bare) and len(whole) > len(bare) and whole[1 : len(bare) + 1] == bare else ""


def keep(path: Path, folder: Path) -> Path:
    """Copy a tokenizer's file, and what transformers wrote beside it, into a folder of a run. Returns the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    name = MODEL if path.suffix == ".model" else FILE
    shutil.copyfile(path, folder / name)
    for beside in BESIDE:
        if (file := path.with_name(beside)).is_file():
            shutil.copyfile(file, folder / beside)
    return folder / name


def write(tokenizer: Tokenizer, directory: Path) -> dict[str, int]:
    """Write the files of a run's tokenizer that transformers' `AutoTokenizer.from_pretrained` reads.

    A tokenizer that came from transformers goes back as it was. For another one they are made: there the separator
    is the token that begins a text and the one that ends it, as in training.

    Returns:
        The ids of these two tokens, for config.json.
    """
    path = Path(tokenizer.name).expanduser()
    if tokenizer.name != "bytes" and path.with_name(CONFIG).is_file():
        keep(path, directory)
        return special_ids(tokenizer, read_json(path.with_name(CONFIG)))
    if path.suffix == ".model":
        shutil.copyfile(path, directory / MODEL)
        separator = write_sentencepiece_config(path, tokenizer, directory)
    else:
        separator = write_json(path, tokenizer, directory)
    return dict(bos_token_id=tokenizer.separator, eos_token_id=tokenizer.separator) if separator else {}


def write_json(path: Path, tokenizer: Tokenizer, directory: Path) -> str:
    """tokenizer.json of bytes, or of a file, which puts the separator before each text; returns the separator."""
    import tokenizers

    made = (
        tokenizers.Tokenizer(byte_pairs()) if tokenizer.name == "bytes" else tokenizers.Tokenizer.from_file(str(path))
    )
    if tokenizer.name == "bytes":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = tokenizers.decoders.ByteLevel()
    separator = made.id_to_token(tokenizer.separator)
    if separator is None:  # the id that seqmodels added
        separator = SEPARATORS[0]
        made.add_special_tokens([separator])
    if made.token_to_id(separator) != tokenizer.separator:
        raise UserError(f"{path}: its ids have gaps, so no token with the id {tokenizer.separator} can be added")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{separator} $A", special_tokens=[(separator, tokenizer.separator)]
    )
    made.save(str(directory / FILE))
    write_config(directory, "PreTrainedTokenizerFast", bos_token=separator, eos_token=separator)
    return separator


def byte_pairs() -> Any:
    """A model of the `tokenizers` library in which each byte is its own id."""
    import tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # the others are written as 256 + i
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return tokenizers.models.BPE(vocab=letters, merges=[])


def write_sentencepiece_config(path: Path, tokenizer: Tokenizer, directory: Path) -> str:
    """tokenizer_config.json of a sentencepiece model; returns the separator, "" if it is no piece."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if tokenizer.separator >= model.vocab_size():
        raise UserError(f"{path} has no piece for the separator, id {tokenizer.separator}, so it cannot be exported")
    separator = model.id_to_piece(tokenizer.separator)
    special = dict(bos_token=separator, eos_token=separator, unk_token=model.id_to_piece(model.unk_id()))
    write_config(directory, "LlamaTokenizer", **special, add_bos_token=True, add_eos_token=False, legacy=False)
    return separator


def write_config(directory: Path, kind: str, **fields: Any) -> None:
    """tokenizer_config.json."""
    text = json.dumps(dict(tokenizer_class=kind, **fields, clean_up_tokenization_spaces=False), indent=2)
    (directory / CONFIG).write_text(text + "\n")


def special_ids(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, int]:
    """bos_token_id and eos_token_id, as far as tokenizer_config.json names tokens that are there."""
    found = {}
    for name in ("bos_token", "eos_token"):
        text = text_of(config.get(name))
        if text and (number := tokenizer.id_of(text)) is not None:
            found[f"{name}_id"] = number
    return found


def text_of(token: Any) -> str:
    """A token of tokenizer_config.json, which is a text or an object with a text."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
