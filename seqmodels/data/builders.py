"""tensorflow-datasets builders for text on this machine.

They write ArrayRecord files, which allow random access and need no TensorFlow.

This module is imported only to build or read a dataset. A finished token cache needs neither it nor the library.
"""

from typing import Any

import tensorflow_datasets as tfds

from seqmodels.data import text
from seqmodels.data.local import SPLITS, LocalText


class ShakespeareAusten(tfds.core.GeneratorBasedBuilder):
    """The corpus that comes with the project; see `seqmodels.data.text.works`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return _info(self, "42 works of William Shakespeare and 6 of Jane Austen.", title=tfds.features.Text())

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        mine = [(title, body) for of, title, body in text.works() if of == split]
        for key, (title, body) in enumerate(mine):
            yield key, {"title": title, "text": body}


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """Documents of local files by split.

    Args:
      local: the text.
      **kwargs: arguments of tfds. Each text needs its own data directory.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, local: LocalText, **kwargs: Any) -> None:
        self._local = local
        super().__init__(**kwargs)

    def _info(self):
        return _info(self, "Text of local files.")

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for key, document in enumerate(self._local.documents(split)):
            yield key, {"text": document}


def _info(builder, description, **features):
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"text": tfds.features.Text(), **features}),
        disable_shuffling=True,  # documents keep their order; keys count up
    )
