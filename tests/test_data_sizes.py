"""Bytes of raw text that tokens stand for: every part of a split has its own, for every kind of tokenizer.

Kind: figures that are wrong (bits per byte over a part of a split counted decoded text).
"""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers as tk

from seqmodels.data import cache, load, load_tokenizer
from seqmodels.data.sizes import Sizes, SizeWriter, sizes_of
from seqmodels.data.sources import find_source, fingerprint
from tests.data_fixtures import text_config

WORDS = ["the", "of", "and", "naïve", "“quoted”", "日本語", "🙂", "Straße", "", "", "two", "", "spaces\tTab", "é", "½"]
RNG = np.random.default_rng(0)
TEXT = "".join(" ".join(RNG.choice(WORDS, 12)) + " \n" for _ in range(400))
ODD = "  x🙃 unseen ☃☃ words  \n\n\n" + "q" * 700 + " the 日本語 ½½ 🙂"


def train_sentencepiece(path, **options):
    source = path.with_suffix(".txt")
    source.write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(path.with_suffix("")), minloglevel=2, hard_vocab_limit=False, **options
    )


def save_hugging_face(path, model, trainer, **parts):
    made = tk.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([TEXT], trainer)
    made.save(str(path))


def make(kind, folder):
    """The file of a tokenizer of this kind."""
    path = folder / f"{kind}.{'model' if kind.startswith('sp') else 'json'}"
    byte_level = tk.pre_tokenizers.ByteLevel
    if kind == "sp_unigram":
        train_sentencepiece(path, vocab_size=60)
    elif kind == "sp_fallback":
        train_sentencepiece(path, vocab_size=320, byte_fallback=True, character_coverage=0.98, model_type="bpe")
    elif kind == "byte_level":
        trainer = tk.trainers.BpeTrainer(vocab_size=300, initial_alphabet=byte_level.alphabet())
        parts = dict(pre_tokenizer=byte_level(add_prefix_space=False), post_processor=tk.processors.ByteLevel())
        save_hugging_face(path, tk.models.BPE(), trainer, **parts)
    elif kind == "bpe":
        trainer = tk.trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"])
        normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
        save_hugging_face(path, tk.models.BPE(unk_token="<unk>", fuse_unk=True), trainer, normalizer=normalizer)
    elif kind == "wordpiece":
        trainer = tk.trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"])
        parts = dict(normalizer=tk.normalizers.BertNormalizer(), pre_tokenizer=tk.pre_tokenizers.BertPreTokenizer())
        save_hugging_face(path, tk.models.WordPiece(unk_token="[UNK]"), trainer, **parts)
    else:
        trainer = tk.trainers.WordLevelTrainer(vocab_size=10, special_tokens=["[UNK]"])
        parts = dict(normalizer=tk.normalizers.NFKD(), pre_tokenizer=tk.pre_tokenizers.Whitespace())
        save_hugging_face(path, tk.models.WordLevel(unk_token="[UNK]"), trainer, **parts)
    return str(path)


KINDS = ("bytes", "sp_unigram", "sp_fallback", "byte_level", "bpe", "wordpiece", "wordlevel")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    kind = request.param
    return load_tokenizer(kind if kind == "bytes" else make(kind, tmp_path_factory.mktemp("tokenizers")))


def test_sizes_are_those_of_the_text_up_to_each_token(tokenizer):
    """A prefix of the text that ends between two words is as long as its tokens say, whatever follows."""
    for text in (TEXT, ODD, "", "   ", "x"):
        ((ids, sizes),) = tokenizer.encode_with_sizes([text])
        np.testing.assert_array_equal(ids, tokenizer.encode_batch([text])[0])
        assert len(ids) == len(sizes) and (sizes >= 0).all()
        assert sizes.sum() == (len(text.encode()) if len(ids) else 0)
    text = TEXT[:4000]
    ((ids, sizes),) = tokenizer.encode_with_sizes([text])
    ends, compared = np.cumsum(sizes), 0
    for word in re.finditer(r"\S+", text):
        prefix = text[: word.end()]
        own = tokenizer.encode(prefix)
        dropped = word[0].endswith("\u0301") and "wordpiece" in tokenizer.name  # it counts with the next token
        if own == ids[: len(own)].tolist() and not dropped:  # else the last token also holds what follows
            assert ends[len(own) - 1] == len(prefix.encode())
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("text", ["🙃", "日本語 🙃🙃 é"])
def test_a_character_of_several_tokens_counts_with_the_last(tmp_path, text):
    tokenizer = load_tokenizer(make("byte_level", tmp_path))
    ((ids, sizes),) = tokenizer.encode_with_sizes([text])
    done = 0
    for n, end in enumerate(np.cumsum(sizes), 1):  # the oracle: bytes of the characters that are complete
        complete = _bytes(tokenizer, ids[:n])
        assert end == len(complete.decode("utf-8", errors="ignore").encode())
        done = end
    assert done == len(text.encode())


def _bytes(tokenizer, ids):
    """The bytes that byte-level tokens stand for, by the table of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable} | {
        chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*printable}))
    }
    return bytes(table[c] for i in ids for c in tokenizer._model.id_to_token(int(i)))


def test_parts_of_a_split_add_up_to_its_raw_text(tokenizer, tmp_path):
    raw = {"a.txt": ODD * 2, "b.txt": TEXT, "c.txt": "\u3000☃" * 3 + TEXT[:4000], "d.txt": TEXT}
    data = load(text_config(tmp_path, raw, tokenizer=tokenizer.name), seq_len=8, batch_size=2)
    for name in ("train", "validation", "test"):
        split = data[name]
        targets = len(split.tokens) - 1
        cuts = [0, *sorted(np.random.default_rng(1).integers(0, targets, 20).tolist()), targets]
        parts = [split.sizes.between(a + 1, b + 1) for a, b in itertools.pairwise(cuts)]
        assert sum(parts) == split.bytes == data.meta["splits"][name]["bytes"]
        assert split.bytes_of(cuts[5], 1) == sum(parts[:5])
        starts = [8 * (n * split.row_count(8) // 3) for n in range(3)]  # rows of 8 targets, spread over the split
        assert split.bytes_of(8, 3) == sum(split.sizes.between(s + 1, s + 9) for s in starts)
    # the first documents of the training split are whole files: each is as long as its tokens say
    documents = data["train"].documents.tolist()
    assert data["train"].sizes.between(documents[0] + 1, documents[1] + 1) == len(raw["a.txt"].encode())
    assert data["train"].sizes.between(documents[1] + 1, documents[2] + 1) == len(raw["b.txt"].encode())


def test_sizes_by_the_rule():
    np.testing.assert_array_equal(sizes_of(np.array([2, 8]), np.array([5, 9]), 12), [5, 7])  # gaps, and the end
    np.testing.assert_array_equal(sizes_of(np.array([0, 3, 3]), np.array([4, 4, 4]), 4), [3, 0, 1])  # shared
    np.testing.assert_array_equal(sizes_of(np.array([0, 4, 4]), np.array([4, 4, 8]), 8), [4, 0, 4])  # an empty one
    assert sizes_of(np.zeros(0), np.zeros(0), 7).shape == (0,)


def test_wide_tokens_and_documents_without_tokens(tmp_path):
    with SizeWriter(tmp_path) as writer:
        writer.write(np.zeros(0, int), 5)  # counts with the next token, a separator
        writer.write(np.array([255, 256, 70_000]), 70_511)
        writer.write(np.zeros(0, int), 300)  # the last: counts with the last token that is there
    sizes = Sizes.read(tmp_path)
    assert [sizes.between(i, i + 1) for i in range(6)] == [0, 5, 255, 256, 70_000, 300]
    assert sizes.between(1, 6) == 5 + 70_511 + 300


def test_a_cache_of_an_earlier_version_serves_where_its_text_is_gone(tmp_path, capsys):
    config = text_config(tmp_path, {"a.txt": TEXT})
    new = load(config, seq_len=8, batch_size=2)
    source = find_source(config)
    key, content = source.before
    stem = f"{source.label}-{fingerprint([key, new.tokenizer.fingerprint, cache.BEFORE])}-{content}"
    old = new.folder.rename(new.folder.with_name(stem))  # as that version wrote it
    meta = json.loads((old / "meta.json").read_text())
    for name, split in meta["splits"].items():
        del split["sha256"]
        split.pop("files", None)
        for file in ("sizes.bin", "wide.npy"):
            (old / name / file).unlink()
    (old / "meta.json").write_text(json.dumps(meta))
    again = load(config, seq_len=8, batch_size=2)  # the text is there: made anew, once
    assert again.folder == new.folder and again["train"].sizes is not None
    shutil.rmtree(again.folder)
    (tmp_path / "raw" / "a.txt").unlink()
    served = load(config, seq_len=8, batch_size=2)
    assert served.folder == old and served["train"].sizes is None and "estimates" in capsys.readouterr().err
    assert set(served.fingerprints) == {"tokenizer"}
    split = served["validation"]
    assert split.bytes_of(7) == split.bytes
    assert split.bytes_of(50, 2) == round(split.bytes * 100 / (len(split.tokens) - 1))
