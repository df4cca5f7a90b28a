"""Tokenizers: round trips, separators, unreadable files. The sentencepiece and Hugging Face models are trained here."""

import io

import numpy as np
import pytest

from seqmodels.data import load, load_tokenizer, train_tokenizer
from seqmodels.errors import UserError
from tests.data_fixtures import POEM, text_config

TEXT = "line 7: the lazy dog, naïve café"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of tokenizers with and without a token of their own to separate documents."""
    import sentencepiece
    import tokenizers

    folder = tmp_path_factory.mktemp("tokenizers")
    for name, ids in (("eos", {}), ("bos", dict(eos_id=-1)), ("none", dict(eos_id=-1, bos_id=-1))):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*POEM.splitlines(), TEXT]),
            model_writer=model,
            vocab_size=300,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )
        (folder / f"{name}.model").write_bytes(model.getvalue())
    for name, special in (("eos", ["<|endoftext|>"]), ("none", [])):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(POEM.splitlines(), trainer)
        tokenizer.save(str(folder / f"{name}.json"))
    return folder


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.dtype) == (257, 256, np.uint16)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xA9, 256, *"né".encode(), 260, 0xC3]) == "né"


@pytest.mark.parametrize("name", ["bytes", "eos.model", "bos.model", "none.model", "eos.json", "none.json"])
def test_round_trip_and_separator(models, name):
    tokenizer = load_tokenizer("bytes" if name == "bytes" else str(models / name))
    ids = tokenizer.encode(TEXT)
    assert ids and all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.separator, *ids, tokenizer.vocab_size + 5]) == TEXT
    batch = tokenizer.encode_batch([TEXT, "dog"])
    assert [b.tolist() for b in batch] == [ids, tokenizer.encode("dog")]


def test_separators_are_the_models_own_or_one_id_more(models):
    import sentencepiece
    import tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(models / "none.model"))
    none = load_tokenizer(str(models / "none.model"))
    assert none.separator == processor.vocab_size() and none.vocab_size == processor.vocab_size() + 1
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models / "eos.model"))
    eos = load_tokenizer(str(models / "eos.model"))
    assert eos.separator == processor.eos_id() and eos.vocab_size == processor.vocab_size()
    assert load_tokenizer(str(models / "bos.model")).separator == 1
    size = tokenizers.Tokenizer.from_file(str(models / "none.json")).get_vocab_size()
    none = load_tokenizer(str(models / "none.json"))
    assert (none.separator, none.vocab_size) == (size, size + 1)
    eos = load_tokenizer(str(models / "eos.json"))
    assert eos.separator == 0
    assert 0 not in eos.encode("a text that says <|endoftext|> is text")


@pytest.mark.parametrize("name", ["eos.model", "none.json"])
def test_dataset_reads_back(models, tmp_path, name):
    config = text_config(tmp_path, {"a.txt": POEM, "b.txt": POEM[:99]}, tokenizer=str(models / name))
    data = load(config, seq_len=16, batch_size=2)
    assert data.tokenizer.name == str(models / name)
    train = data["train"]
    assert train.tokens[0] == data.tokenizer.separator
    decoded = data.tokenizer.decode(train.tokens)
    assert POEM.startswith(decoded[:500]) and train.bytes == pytest.approx(0.9 * (len(POEM) + 99), rel=0.02)
    bytes_folder = load(text_config(tmp_path, {}), seq_len=16, batch_size=2).folder
    assert data.folder != bytes_folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words", None, r"config\.data\.tokenizer='.*words': must be 'bytes', the path of"),
        ("a.model", None, r"config\.data\.tokenizer='.*a\.model': cannot be read \(No such file or directory\)"),
        ("a.json", None, r"cannot be read \(No such file or directory\)"),
        ("a.model", "not a model", r"a\.model': is not a sentencepiece model"),
        ("a.json", "{}", r"a\.json': is not a Hugging Face tokenizer\.json"),
    ],
)
def test_bad_tokenizers(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_a_folder_and_a_name_on_the_hub(models, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes((models / f"eos{folder.suffix}").read_bytes())
        assert load_tokenizer(str(folder)).encode(TEXT) == load_tokenizer(str(models / f"eos{folder.suffix}")).encode(
            TEXT
        )
    with pytest.raises(UserError, match=r"the folder has neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(str(tmp_path))

    def download(repository, file):
        if (repository, file) != ("somebody/words", "tokenizer.json"):
            raise ConnectionError("no network\nat all")
        return str(models / "eos.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_tokenizer("somebody/words").name == str(models / "eos.json")
    with pytest.raises(UserError, match=r"'other/words': no such file or folder, and .* does not give it: no network$"):
        load_tokenizer("other/words")


def test_a_tokenizer_is_trained_by_one_command(tmp_path, capsys):
    (tmp_path / "poem.txt").write_text(POEM)
    out = tmp_path / "made" / "bpe.json"
    command = [f"--path={tmp_path}/*.txt", "--size=300", f"--out={out}"]
    assert train_tokenizer.main(command) == 0 and "300 ids" in capsys.readouterr().out
    tokenizer, before = load_tokenizer(str(out)), out.read_bytes()
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode(POEM)) < len(POEM) / 3
    assert train_tokenizer.main(command) == 0 and out.read_bytes() == before
    capsys.readouterr()
    for wrong, message in (
        ("--size=256", "--size=256: must be from 257"),
        ("--path=/nowhere/x", "--path=/nowhere/x: matches no file"),
        ("--out=x.txt", "--out=x.txt: must be a file that ends in .json"),
    ):
        assert train_tokenizer.main([*command, wrong]) == 1
        assert message in (said := capsys.readouterr().err) and said.count("\n") == 1
