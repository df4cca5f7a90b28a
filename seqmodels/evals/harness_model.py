"""A trained model as EleutherAI's lm-evaluation-harness wants it. Importing this needs lm-eval."""

from typing import Any

import flax.linen as nn
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.evals import likelihood
from seqmodels.evals.answers import answers
from seqmodels.generation import Sampling


class HarnessModel(LM):
    """Answers the three kinds of requests of lm-eval on the devices of this process.

    Every text begins a document, so the separator is put before it. If a text is longer than the context of a
    Transformer, its beginning is cut off. A recurrent model reads all of it.

    Args:
      model, params: as in docs/architecture.md; params unboxed.
      tokenizer: as in docs/architecture.md.
      piece: tokens of a row that are read at once.
      batch_size: rows at once.
      context: tokens that the model can see; None: any number.
      mesh: devices to spread rows over.
      seed: of generated texts, where a task wants them sampled.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: Tokenizer,
        *,
        piece: int,
        batch_size: int,
        context: int | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self._scoring: dict[str, Any] = dict(piece=piece, batch_size=batch_size, context=context, mesh=mesh)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it the greedy one) of each (context, continuation)."""
        found = self._score(likelihood.continuations(self.tokenizer, [r.args for r in requests], self.context))
        return [(-score.nats, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of each (text,), a document of its own."""
        windows = [likelihood.windows(self.tokenizer, request.args[0], self.context) for request in requests]
        scores = iter(self._score([window for text in windows for window in text]))
        return [-sum(next(scores).nats for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each (context, options), up to a stop string, the end of the document or `max_gen_toks`."""
        kinds: dict[tuple, list[int]] = {}  # requests that may be answered together
        for i, request in enumerate(requests):
            options = request.args[1]
            kinds.setdefault((int(options.get("max_gen_toks", 256)), sampling_of(options)), []).append(i)
        texts = [""] * len(requests)
        for (tokens, sampling), members in kinds.items():
            found = answers(
                self.model,
                self.params,
                self.tokenizer,
                [self._prompt(requests[i].args[0], tokens) for i in members],
                [stops_of(requests[i].args[1]) for i in members],
                tokens=tokens,
                batch_size=self.batch_size,
                sampling=sampling,
                seed=self.seed,
            )
            for i, text in zip(members, found, strict=True):
                texts[i] = text
        return texts

    def _score(self, requests: list[likelihood.Request]) -> list[likelihood.Likelihood]:
        return likelihood.score(self.model, self.params, requests, **self._scoring)

    def _prompt(self, text: str, tokens: int) -> list[int]:
        ids = [likelihood.begin(self.tokenizer), *self.tokenizer.encode(text)]
        if self.context is None:
            return ids
        if tokens >= self.context:
            raise UserError(f"max_gen_toks={tokens}: must be less than the Transformer's context of {self.context}")
        return ids[-(self.context - tokens) :]


def stops_of(options: dict) -> list[str]:
    """Texts that end an answer."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def sampling_of(options: dict) -> Sampling:
    """How a task wants its texts drawn: with `do_sample`, or with a temperature alone, by sampling; else greedily."""
    temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
    if not options.get("do_sample", temperature > 0):
        return Sampling(0.0)
    return Sampling(temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)))
