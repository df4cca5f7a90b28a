"""Where text comes from: the embedded corpus, local files, or any tensorflow-datasets text set."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from seqmodels.data import hub, local, text, token_files
from seqmodels.data.local import SPLITS
from seqmodels.data.token_files import TokenRange
from seqmodels.errors import UserError

EMBEDDED = "shakespeare_austen"  # the text that comes with the project
# For a dataset without a validation or test split: how these are cut from the end of its train split.
CUTS = {
    ("validation", "test"): {"train": "train[:-10%]", "validation": "train[-10%:-5%]", "test": "train[-5%:]"},
    ("validation",): {"train": "train[:-5%]", "validation": "train[-5%:]"},
    ("test",): {"train": "train[:-5%]", "test": "train[-5%:]"},
    (): {},
}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of one split, in order; `get(i)` reads the i-th."""

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
      key: JSON value that identifies the request.
      content: identifies the text itself. None if the text is not available, or if its name identifies it.
      open: () -> (content, {split: Documents}). It prepares the dataset if that was not done before.
      before: `key` and `content` as an earlier version made them, to find its caches.
    """

    label: str
    key: dict
    content: str | None
    open: Callable[[], tuple[str, Mapping[str, Documents | TokenRange]]]
    before: tuple[dict, str | None]


def fingerprint(value: Any) -> str:
    """12 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def find_source(config: ConfigDict) -> Source:
    """The source that `config.data` names. This is fast: nothing is prepared, tensorflow-datasets is not imported.

    Raises:
      UserError: fields do not fit together, or a file is of an unknown kind.
    """
    root = Path(config.cache).expanduser() / "tensorflow_datasets"
    if config.name == "text" or (config.name == EMBEDDED and config.path):  # a path alone says what is meant
        files = token_files.files_of(config)
        return _token_source(config, files) if files else _text_source(config, root)
    for name, default in (("validation_path", ""), ("test_path", ""), ("held_out", "end")):
        if config.get(name, default) != default:
            raise UserError(f"config.data.{name}={config[name]!r}: is for files, which config.data.path names")
    if config.name == EMBEDDED:
        content = hashlib.sha256(text.EMBEDDED.read_bytes()).hexdigest()[:12]
        key = {"name": config.name, "splits": text.HELD_OUT}
        return Source(config.name, key, content, lambda: _open_embedded(root, content), (key, content))
    if not config.name:
        raise UserError(
            "config.data.name='': must be 'shakespeare_austen', 'text', 'hf:NAME' or the name of a tensorflow-datasets "
            "text set"
        )
    if config.name.startswith(hub.PREFIX):
        key = {"name": config.name, "text_key": config.text_key}
        return Source("hub", key, None, lambda: _open_hub(config), (key, None))
    key = {"name": config.name, "path": config.path, "text_key": config.text_key}
    label = re.sub(r"[^\w.-]", "-", config.name)
    return Source(label, key, None, lambda: _open_public(config, root), (key, None))


def _token_source(config: ConfigDict, files: dict[str, list[Path]]) -> Source:
    """Files of token ids; see `seqmodels.data.token_files`."""
    key = local.key(config) | {"kind": "tokens"}
    content = fingerprint(token_files.content(files))
    return Source("tokens", key, content, lambda: (content, token_files.open_splits(files)), (key, content))


def _open_hub(config: ConfigDict) -> tuple[str, dict[str, Documents]]:
    """The splits of a data set of the Hub. Missing ones are cut from the end of train."""
    table = hub.open_table(config, Path(config.cache).expanduser())
    missing = [split for split in SPLITS[1:] if split not in table]
    rows = len(table["train"])
    held = int(rows * text.HELD_OUT_SHARE)
    ranges = {split: (table[split], 0, len(table[split])) for split in SPLITS if split in table}
    ranges["train"] = (table["train"], 0, rows - held * len(missing))
    for place, split in enumerate(missing):
        first = rows - held * (len(missing) - place)
        ranges[split] = (table["train"], first, first + held)

    def documents(split: str) -> Documents:
        part, first, last = ranges[split]
        return Documents(split, last - first, lambda number: hub.text_of(part[first + number], config.text_key))

    content = fingerprint([config.name, {s: [len(t), getattr(t, "_fingerprint", "")] for s, t in table.items()}])
    return content, {split: documents(split) for split in SPLITS}


def _text_source(config: ConfigDict, root: Path) -> Source:
    found = local.local_text(config)
    files = [file for files in found.files.values() for file in files]
    key = local.key(config)
    old = key | {"path": config.path}
    # The contents are read at every start. Size and time of a file may stay the same when its text changes, and reading
    # takes about a second for a gigabyte, far less than tokenising it. Without files a finished cache suffices.
    content = fingerprint(local.content(found)) if files else None
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]

    def open_files() -> tuple[str, dict[str, Documents]]:
        if content is None:
            raise UserError(f"config.data.path={config.path!r}: matches no file{hub.hint(config.path)}")
        found.check()
        if warning := found.warning():
            print(warning, file=sys.stderr, flush=True)
        from seqmodels.data.builders import TextFiles

        folder = root / f"text-{fingerprint([key, content])}"
        builder = TextFiles(local=found, data_dir=str(folder), file_format="array_record")
        return content, _prepare_local(builder)

    return Source("text", key, content, open_files, (old, fingerprint(stats) if files else None))


def _open_embedded(root: Path, content: str):
    from seqmodels.data.builders import ShakespeareAusten

    return content, _prepare_local(ShakespeareAusten(data_dir=str(root), file_format="array_record"))


def _prepare_local(builder) -> dict[str, Documents]:
    """Write one of our own datasets if it does not exist yet, and open its splits."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it would print that it downloads
        builder.download_and_prepare()
    return _open_splits(builder, "text")


def _open_splits(builder, text_key: str) -> dict[str, Documents]:
    """The splits train, validation and test of a prepared dataset. Missing ones are cut from the end of train."""
    missing = tuple(split for split in SPLITS[1:] if split not in builder.info.splits)
    selections = {split: split for split in SPLITS} | CUTS[missing]
    documents = {}
    for split, selection in selections.items():
        records = builder.as_data_source(split=selection)
        documents[split] = Documents(split, len(records), functools.partial(_text_of, records, text_key))
    return documents


def _text_of(records, text_key: str, number: int) -> str:
    value = records[number][text_key]
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _open_public(config, root: Path):
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # registers the text sets

    name = config.name
    try:
        if config.path:
            builder = tfds.builder_from_directory(str(Path(config.path).expanduser()))
        else:
            builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        known = ["shakespeare_austen", "text", *tfds.list_builders(with_community_datasets=False)]
        nearest = difflib.get_close_matches(name.split("/")[0].split(":")[0], dict.fromkeys(known), cutoff=0.4)
        hint = f" (nearest: {', '.join(nearest)})" if nearest else ""
        raise UserError(
            f"config.data.name={name!r}: no such dataset{hint}; 'text' reads config.data.path{hub.hint(name)}"
        ) from error
    except Exception as error:  # of many types: no such config, no such folder, a format that needs TensorFlow
        if config.path:
            reason = f"config.data.path={config.path!r}: no prepared dataset: {_last_line(error)}"
        elif configs := _configs(name):
            reason = f"config.data.name={name!r}: no such config or version; there are {', '.join(configs[:60])}"
        else:
            reason = f"config.data.name={name!r}: {_last_line(error)}"
        raise UserError(reason) from error
    if config.text_key not in builder.info.features:
        raise UserError(
            f"config.data.text_key={config.text_key!r}: {name!r} has the features {', '.join(builder.info.features)}"
        )
    if "train" not in (builder.info.splits or {"train": None}):
        raise UserError(f"config.data.name={name!r}: has no train split, only {', '.join(builder.info.splits)}")
    try:
        _check_network(builder)
        builder.download_and_prepare()
        documents = _open_splits(builder, config.text_key)
    except Exception as error:  # whatever an upstream builder, a download or a missing TensorFlow may raise
        raise UserError(
            f"config.data.name={name!r}: cannot be prepared here ({type(error).__name__}: {_last_line(error)}). "
            "Prepare it once where there is a network and TensorFlow (pip install tensorflow), with "
            f"tfds.builder({name!r}, data_dir={str(root)!r}, file_format='array_record').download_and_prepare(), "
            "and bring the folder here; or set config.data.path to a folder that holds it prepared; "
            "or use config.data.name='text' with files of your own"
        ) from error
    return fingerprint([builder.info.full_name, {s: d.count for s, d in documents.items()}]), documents


def _configs(name: str) -> list[str]:
    """Names of the configs of a public dataset; none for a name that is not one's, such as "../x"."""
    import tensorflow_datasets as tfds

    try:
        return [config.name for config in tfds.builder_cls(name.split("/")[0].split(":")[0]).BUILDER_CONFIGS]
    except Exception:  # of many types, as above
        return []


def _check_network(builder):
    """Fail at once if there is no network. A download would fail only after minutes of retries.

    Raises:
      ConnectionError: no host of the dataset's downloads has an address, and no proxy is set that might reach one.
    """
    hosts = {urllib.parse.urlparse(url).hostname for url in builder.url_infos or ()} - {None}
    if builder.is_prepared() or not hosts or urllib.request.getproxies():
        return
    for host in hosts:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, 443)
            return
    raise ConnectionError(f"no network: {', '.join(sorted(hosts)[:3])} not found")


def _last_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[-1][-200:]
