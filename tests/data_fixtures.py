"""Small texts and configs for the tests of the data pipeline."""

from seqmodels.configs.base import base
from seqmodels.data import load

POEM = "".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(400))


def data_config(tmp_path, **fields):
    """`config.data` with its cache under tmp_path and some fields replaced."""
    config = base().data
    config.cache = str(tmp_path / "cache")
    config.update(fields)
    return config


def text_config(tmp_path, texts, **fields):
    """`config.data` for local files: texts is a dict of file name -> content."""
    folder = tmp_path / "raw"
    folder.mkdir(exist_ok=True)
    for name, content in texts.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return data_config(tmp_path, name="text", path=str(folder / "*"), **fields)


def open_(config, seq_len=16, batch_size=4, **kwargs):
    """The dataset of `config.data`."""
    return load(config, seq_len=seq_len, batch_size=batch_size, **kwargs)
