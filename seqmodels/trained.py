"""Trained models in a few lines of Python: `run = seqmodels.load("runs/densemamba")`, `run.generate("To be")`."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqmodels import cloud, generation
from seqmodels.backbone import context, scanned
from seqmodels.config import upgrade
from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.evals.run import load_run
from seqmodels.model import SequenceModel, build
from seqmodels.training import sharding

Text = str | Sequence[int]  # token ids stand for themselves; a text begins with the separator, if there is one


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained language model with its tokenizer. Made by `load` and `from_pretrained`.

    Attributes:
        config: of the run; `config.model` describes the model.
        model: a Flax module, see docs/architecture.md.
        params: float32, without boxes; where the run keeps averaged parameters, those.
        tokenizer: of the run; None: token ids are all that it reads.
        step: of the checkpoint.
        mesh: of the devices that hold the parameters.
    """

    config: ConfigDict
    model: SequenceModel
    params: Any
    tokenizer: Tokenizer | None
    step: int
    mesh: Mesh

    def encode(self, text: Text) -> list[int]:
        """Token ids of a text, after the separator. Token ids stay as they are."""
        if not isinstance(text, str):
            return [int(token) for token in text]
        tokenizer = self._words()
        return [*([tokenizer.separator] if tokenizer.separator >= 0 else []), *tokenizer.encode(text)]

    def hidden(self, text: Text) -> np.ndarray:
        """Hidden states [T, D] float32 after the last norm, one a token."""
        with self._devices():
            return np.asarray(_read(self.model, self.params, self._row(text))[0], np.float32)[0]

    def logits(self, text: Text) -> np.ndarray:
        """Logits [T, V] float32 of the token that follows each token of the text. V is the tokenizer's vocabulary.

        T counts the separator before the text, too.
        """
        with self._devices():
            hidden, _ = _read(self.model, self.params, self._row(text))
            logits = np.asarray(self.model.apply({"params": self.params}, hidden, method="logits"))[0]
        return logits if self.tokenizer is None else logits[:, : self.tokenizer.vocab_size]

    def states(self, text: Text) -> dict[str, Any]:
        """The states of all layers after the text, by "layer.branch", such as "0.mixer": float32 arrays.

        The arrays, and their axes behind the batch of 1, are those of the branch's `init_state`.
        """
        row = self._row(text)
        with self._devices():
            _, state = _read(self.model, self.params, row)
        return {
            f"{layer}.{branch}": jax.tree.map(np.asarray, values)
            for layer, branches in enumerate(_by_layer(self.model.config, state["layers"]))
            for branch, values in branches.items()
        }

    def generate(
        self, prompts: str | Sequence[str], tokens: int = 200, *, num_samples: int | None = None, **sampling: Any
    ) -> Any:
        """What follows each prompt, up to `tokens` tokens or the end of the document.

        Args:
            prompts: one text, or several, which are continued side by side.
            num_samples: continuations of each prompt; None: one, which is not in a list of its own.
            **sampling: temperature, top_k, top_p, seed and stop, as in `seqmodels.generation.generate`. The default is
                to draw from the model's own distribution; temperature=0 takes the likeliest token.

        Returns: a text for one prompt, a list for several; with num_samples, of lists with so many texts.

        Raises: UserError for numbers out of range, or if prompt and answer exceed the context.
        """
        if num_samples is not None and num_samples < 1:
            raise UserError(f"num_samples={num_samples}: must be at least 1")
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        count = num_samples or 1
        with self._devices():
            texts = generation.generate_all(
                self.model,
                self.params,
                self._words(),
                [prompt for prompt in several for _ in range(count)],
                tokens=tokens,
                context=context(self.config),
                **sampling,
            )
        answers = [texts[i : i + count] for i in range(0, len(texts), count)]
        results: list[Any] = answers if num_samples else [answer[0] for answer in answers]
        return results[0] if isinstance(prompts, str) else results

    def _words(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("there is no tokenizer: name one, or give token ids")
        return self.tokenizer

    def _row(self, text: Text) -> np.ndarray:
        """[1, T] int32. Raises: UserError for an id outside the vocabulary, or no token."""
        ids = self.encode(text)
        size = self.model.input_size if self.tokenizer is None else self.tokenizer.vocab_size
        generation.check_prompts([ids], size)
        return np.asarray([ids], np.int32)

    @contextlib.contextmanager
    def _devices(self) -> Iterator[None]:
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            yield


def load(path: str | Path, step: str = "latest") -> Trained:
    """The model of a run directory, which train.py or convert.py made. Its text need not be there.

    Args:
        path: the directory, also in a cloud (gs://bucket/run).
        step: "latest", "best" (by `config.checkpoint.best`) or a number.

    Raises: UserError if there is no run, no such checkpoint, or the model predicts no tokens.
    """
    if cloud.is_cloud(path):
        with cloud.copied(path) as copy:
            return load(copy.folder, step)
    run = load_run(path, str(step), text=False)
    if run.config.model.head != "next_token":
        raise UserError(f"{path}: predicts {run.config.model.head}, not tokens; seqmodels.evals.run.load_run reads it")
    return Trained(run.config, run.model, run.params, run.dataset.tokenizer, run.step, run.mesh)


def from_pretrained(path: str | Path) -> Trained:
    """The model of a directory that transformers wrote (`save_pretrained`), or in another form of docs/interop.md.

    Raises: UserError if files are missing, or hold a model that cannot be imported.
    """
    from seqmodels.interop import pretrained, runs

    path = Path(path).expanduser()
    config = runs.config_of(path, Path(path.name))
    fields, params = pretrained.load(path)
    with tempfile.TemporaryDirectory() as folder:
        words = runs.load_words(config, Path(folder)) if config.data.tokenizer else None
    model = build(config.model, words.vocab_size if words else fields["vocab_size"])
    return Trained(upgrade(config), model, jax.device_put(params), words, 0, sharding.flat_mesh())


def _by_layer(model: Any, layers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The states of each block by branch, in the order of the blocks. `model` is config.model."""
    unrolled, repeats = scanned(model)
    for i in range(unrolled):
        yield layers[f"block_{i}"]
    for r in range(repeats):
        for i in range(len(layers["blocks"])):
            yield jax.tree.map(lambda x, r=r: x[:, r], layers["blocks"][f"block_{i}"])


def _read(model: SequenceModel, params: Any, tokens: np.ndarray) -> tuple[jax.Array, Any]:
    """Hidden states [1, T, D] of a row, and the state after it."""
    state = generation.fresh_state(model, 1, tokens.shape[1])
    return _apply(model, params, tokens, state)


_apply = jax.jit(
    lambda model, params, tokens, state: model.apply({"params": params}, tokens, state=state), static_argnums=0
)
