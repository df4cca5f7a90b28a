"""Trains a tokenizer on text of your own.

  python -m seqmodels.data.train_tokenizer --path=books --size=8192 --out=bpe8192.json
  python train.py --config=configs/mamba.py --config.data.path=books --config.data.tokenizer=bpe8192.json

It is a byte-level BPE, so every text can be encoded, and comes back as it was. The same files give the same tokenizer.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from seqmodels.data.readers import find_files, read_all
from seqmodels.errors import UserError

SEPARATOR = "<|endoftext|>"


def train(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE of `size` ids, the separator <|endoftext|> among them, as a `tokenizers.Tokenizer`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def until(texts: Iterable[str], characters: float) -> Iterator[str]:
    """Texts until so many characters are read."""
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.data.train_tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", required=True, help="files, globs or folders, apart by commas, as config.data.path")
    parser.add_argument("--text_key", default="text", help="key of JSON, or column of a table, that holds the text")
    parser.add_argument("--size", type=int, default=8192, help="ids, from 257 on")
    parser.add_argument("--megabytes", type=float, default=100, help="text that is read, from the beginning")
    parser.add_argument("--out", type=Path, required=True, help="file of the tokenizer, which ends in .json")
    options = parser.parse_args(argv)
    try:
        for name, wrong, allowed in (
            ("size", not 257 <= options.size <= 2**24, "from 257 (the bytes and the separator) to 2^24"),
            ("megabytes", not options.megabytes > 0, "above 0"),
            ("out", options.out.suffix != ".json", "a file that ends in .json"),
        ):
            if wrong:
                raise UserError(f"--{name}={getattr(options, name)}: must be {allowed}")
        files = find_files(options.path)
        if not files:
            raise UserError(f"--path={options.path}: matches no file")
        tokenizer = train(until(read_all(files, options.text_key), options.megabytes * 1e6), options.size)
        options.out.expanduser().parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(options.out.expanduser()))
    except (UserError, OSError) as error:
        print(str(error).replace("config.data.", "--"), file=sys.stderr)
        return 1
    print(f"{options.out}: {tokenizer.get_vocab_size()} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
