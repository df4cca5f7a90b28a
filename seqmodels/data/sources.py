"""Where text comes from: the embedded corpus, local files, or any tensorflow-datasets text set. One `Source` for each."""

import dataclasses
import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from seqmodels.data import text
from seqmodels.errors import UserError

SPLITS = ("train", "validation", "test")
# How a set without validation or test split gets them, from the end of its train split.
CUTS = {
    ("validation", "test"): {"train": "train[:-10%]", "validation": "train[-10%:-5%]", "test": "train[-5%:]"},
    ("validation",): {"train": "train[:-5%]", "validation": "train[-5%:]"},
    ("test",): {"train": "train[:-5%]", "test": "train[-5%:]"},
    (): {},
}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of one split, in order. `bytes` is what is known beforehand of their size, for a progress bar."""

    split: str
    count: int
    get: Callable[[int], str]

    def __iter__(self) -> Iterator[str]:
        return (self.get(i) for i in range(self.count))


@dataclasses.dataclass(frozen=True)
class Source:
    """A text that a config asks for.

    Attributes:
      label: readable name, safe in a file name.
      key: what identifies the request, JSON.
      content: what identifies the text itself; None when the text is not at hand or its name identifies it.
      open: () -> (content, {split: Documents}); prepares the dataset if need be.
    """

    label: str
    key: dict
    content: str | None
    open: Callable[[], tuple[str, dict[str, Documents]]]


def fingerprint(value) -> str:
    """12 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def find_source(config) -> Source:
    """The source that `config.data` names. Cheap: nothing is prepared and tensorflow-datasets is not imported.

    Raises:
      UserError: fields that do not go together, or a file of an unknown kind.
    """
    root = Path(config.cache).expanduser() / "tensorflow_datasets"
    if config.name == "shakespeare_austen":
        if config.path:
            raise UserError(f"config.data.path={config.path!r}: is for config.data.name='text', not {config.name!r}")
        content = hashlib.sha256(text.EMBEDDED.read_bytes()).hexdigest()[:12]
        return Source(
            config.name, {"name": config.name, "splits": text.HELD_OUT}, content, lambda: _open_embedded(root, content)
        )
    if config.name == "text":
        return _text_source(config, root)
    if not config.name:
        raise UserError(
            "config.data.name='': must be 'shakespeare_austen', 'text' or the name of a tensorflow-datasets text set"
        )
    key = {"name": config.name, "path": config.path, "text_key": config.text_key}
    return Source(config.name.replace("/", "-").replace(":", "-"), key, None, lambda: _open_public(config, root))


def _text_source(config, root: Path) -> Source:
    if not config.path:
        raise UserError(
            "config.data.path='': config.data.name='text' needs a glob of .txt, .txt.xz, .txt.gz or .jsonl files"
        )
    files = text.find_files(config.path)
    key = {"name": "text", "path": config.path, "text_key": config.text_key, "held_out": text.HELD_OUT_SHARE}
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    content = fingerprint(stats) if files else None  # no files: a finished cache will do

    def open_files():
        if not files:
            raise UserError(f"config.data.path={config.path!r}: matches no file")
        if not any(True for f in files for _ in text.read_documents(f, config.text_key)):
            raise UserError(f"config.data.path={config.path!r}: no text in {len(files)} file(s)")
        from seqmodels.data.builders import TextFiles, TextFilesConfig

        name = fingerprint([key, content])
        builder_config = TextFilesConfig(name=name, version="1.0.0", files=tuple(files), text_key=config.text_key)
        return content, _prepare(
            TextFiles(config=builder_config, data_dir=str(root), file_format="array_record"), "text"
        )

    return Source("text", key, content, open_files)


def _open_embedded(root: Path, content: str):
    from seqmodels.data.builders import ShakespeareAusten

    return content, _prepare(ShakespeareAusten(data_dir=str(root), file_format="array_record"), "text")


def _prepare(builder, text_key: str) -> dict[str, Documents]:
    """Writes a builder's dataset if it is not there yet, and opens its splits."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder.download_and_prepare()
    missing = tuple(split for split in SPLITS[1:] if split not in builder.info.splits)
    selections = {split: split for split in SPLITS} | CUTS[missing]
    documents = {}
    for split, selection in selections.items():
        records = builder.as_data_source(split=selection)
        documents[split] = Documents(split, len(records), lambda i, records=records: _decode(records[i][text_key]))
    return documents


def _decode(value) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _open_public(config, root: Path):
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # noqa: F401, registers the text sets

    name = config.name
    try:
        if config.path:
            builder = tfds.builder_from_directory(str(Path(config.path).expanduser()))
        else:
            builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        if config.path:
            raise UserError(f"config.data.path={config.path!r}: holds no prepared tensorflow-datasets set") from error
        known = ["shakespeare_austen", "text", *tfds.list_builders()]
        nearest = difflib.get_close_matches(name.split("/")[0], known, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise UserError(f"config.data.name={name!r}: no such dataset{hint}, or 'text' with config.data.path") from error
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"config.data.name={name!r}: {_first_line(error)}") from error
    if config.text_key not in builder.info.features:
        raise UserError(
            f"config.data.text_key={config.text_key!r}: {name!r} has the features {', '.join(builder.info.features)}"
        )
    if "train" not in (builder.info.splits or {"train": None}):
        raise UserError(f"config.data.name={name!r}: has no train split, only {', '.join(builder.info.splits)}")
    try:
        documents = _prepare(builder, config.text_key)
    except UserError:
        raise
    except Exception as error:  # whatever an upstream builder, a download or a missing TensorFlow may raise
        raise UserError(
            f"config.data.name={name!r}: cannot be prepared here ({type(error).__name__}: {_first_line(error)}). Prepare it once "
            f"where there is a network and TensorFlow (pip install tensorflow), with tfds.builder({name!r}, data_dir={str(root)!r}, "
            "file_format='array_record').download_and_prepare(), and bring the folder here; or set config.data.path to a folder "
            "that holds it prepared; or use config.data.name='text' with files of your own"
        ) from error
    return fingerprint([builder.info.full_name, {s: d.count for s, d in documents.items()}]), documents


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]
