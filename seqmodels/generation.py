"""Continue a prompt: read it in chunks, then draw one token after another.

Both use the model's ordinary call with an explicit state. The state is donated from call to call, so only one copy of
it exists. In recurrent models its size does not depend on how much text was read. The first axis of every leaf is the
batch: `jax.tree.map(lambda x: x[rows], state)` selects, repeats or reorders rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.data.tokenizer import Tokenizer
from seqmodels.errors import UserError
from seqmodels.rounding import rounded

LARGEST_CHUNK = 512  # tokens prefilled at once
NO_TOKEN = -2  # in place of a token, where the logits are not finite
BLOCK = 32  # tokens drawn between two calls of the caller's `enough`


class Sampling(NamedTuple):
    """How a token is drawn from logits. Each field is a scalar, or an array [B] with one value for each row.

    temperature: logits are divided by it, finite; 0 always takes the likeliest token.
    top_k: draw only from the k likeliest tokens; 0 is all.
    top_p: draw only from the fewest likeliest tokens whose probabilities sum up to at least p; 1 is all.
    The temperature is applied first, then top_k, then top_p to the tokens that are left.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0


FROM_ALL = Sampling()  # the model's own distribution


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] at the temperature, with -inf for the tokens that top_k and top_p leave out.

    Tokens with the same probability as the last token that is kept are kept, too.

    Args:
      logits: [B, V] float32.
    """
    top_k, top_p = (jnp.broadcast_to(jnp.asarray(x), logits.shape[:1])[:, None] for x in sampling[1:])
    logits = scaled(logits, sampling.temperature)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where((top_k == 0) | (rank < top_k), ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (ordered > -jnp.inf) & ((before < top_p) | (top_p >= 1.0) | (rank == 0))
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def cheapest_method(sampling: Sampling) -> str:
    """The cheapest method of `draw` that suffices for a sampling. It must be known before compiling.

    "greedy" takes the likeliest token, without random numbers. "plain" draws from all tokens. "filtered" first sorts
    the vocabulary, for top_k and top_p; on a GPU this takes as long as many layers.
    """
    if np.all(np.asarray(sampling.temperature) == 0):
        return "greedy"
    return (
        "plain" if np.all(np.asarray(sampling.top_k) == 0) and np.all(np.asarray(sampling.top_p) >= 1) else "filtered"
    )


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling, method: str = "filtered") -> jax.Array:
    """Draws one token for each row.

    Args:
      keys: [B] typed random keys.
      logits: [B, V] float32.
      method: result of `cheapest_method`, or a more expensive method, which draws the same tokens.

    Returns:
      [B] int32.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if method == "greedy":
        return greedy
    weights = filtered(logits, sampling) if method == "filtered" else scaled(logits, sampling.temperature)
    sampled = jax.vmap(jax.random.categorical)(keys, weights).astype(jnp.int32)
    return jnp.where(jnp.asarray(sampling.temperature) > 0, sampled, greedy)


def scaled(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """logits [B, V] divided by a temperature, a scalar or [B]. At temperature 0 they are unchanged."""
    temperature = jnp.broadcast_to(jnp.asarray(temperature), logits.shape[:1])[:, None]
    return logits / jnp.where(temperature > 0, temperature, 1.0)


def chunks(length: int) -> list[int]:
    """Sizes that sum up to `length`: powers of two, at most LARGEST_CHUNK, so that few programs serve every length."""
    sizes = [LARGEST_CHUNK] * (length // LARGEST_CHUNK)
    rest = length % LARGEST_CHUNK
    return sizes + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def read_chunk(
    model: nn.Module, params: Any, tokens: jax.Array | np.ndarray, mask: jax.Array | np.ndarray | None, state: Any
) -> tuple[jax.Array, Any]:
    """Read the next [B, T] tokens of the prompts into the state. `prefill` does so for each of `chunks`."""
    hidden, state = model.apply({"params": params}, tokens, mask=mask, state=state)
    return hidden[:, -1:], state


def prefill(
    model: nn.Module, params: Any, tokens: jax.Array | np.ndarray, mask: jax.Array | np.ndarray | None, state: Any
) -> tuple[jax.Array, Any]:
    """Reads prompts into the state.

    Args:
      tokens: [B, P] int32, P >= 1, each prompt at the right end of its row.
      mask: [B, P] bool, False on the padding before it; None: there is none.
      state: of the B rows; consumed.

    Returns:
      The last token's hidden state [B, 1, D], which predicts the first new token, and the state.
    """
    start = 0
    for size in chunks(tokens.shape[1]):
        piece = slice(start, start + size)
        hidden, state = read_chunk(model, params, tokens[:, piece], None if mask is None else mask[:, piece], state)
        start += size
    return hidden, state


@functools.partial(jax.jit, static_argnames=("model", "method", "room"), donate_argnames="state")
def draw_tokens(
    model: nn.Module,
    params: Any,
    hidden: jax.Array,
    state: Any,
    keys: jax.Array,
    done: jax.Array | np.ndarray,
    sampling: Sampling,
    vocab_size: int,
    stop: int,
    first: int,
    tokens: int,
    *,
    method: str,
    room: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Draws `tokens` new tokens for each row. Only `method`, `room` and the shapes decide what is compiled.

    Args:
      params: result of `rounded`.
      hidden, state: results of `prefill` or of the last call; the state is consumed.
      keys: [B] typed random keys, one for each row.
      done: [B] bool, the rows that have already reached `stop`.
      first: how many tokens were drawn in earlier calls.
      method: as in `draw`.
      room: length of the array that the tokens are written to, at least `tokens`.

    Returns:
      The tokens [B, room] int32, and the hidden state and state for the next call. A token is `NO_TOKEN` where the
      logits are not finite.
    """
    params, head = ({"params": tree} for tree in params)
    rows = hidden.shape[0]
    if rows == 1 and jax.default_backend() == "gpu":
        # Repeat a single row: with one row XLA does not use a matrix product, but writes products to memory and sums.
        hidden, state, keys, done = jax.tree.map(lambda x: jnp.concatenate([x, x]), (hidden, state, keys, done))

    def unfinished(carry):
        step, _, _, _, done = carry
        return (step < tokens) & ~jnp.all(done)

    def body(carry):
        step, hidden, state, out, done = carry
        logits = model.apply(head, hidden, method="logits")[:, 0].astype(jnp.float32)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, first + step)
        token = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), draw(step_keys, logits, sampling, method), NO_TOKEN)
        token = jnp.where(done, stop, token)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        hidden, state = model.apply(params, token[:, None], state=state)
        return step + 1, hidden, state, out, done | (token == stop)

    batch = hidden.shape[0]
    out = jnp.full((batch, room), stop, jnp.int32)
    carry = jnp.zeros((), jnp.int32), hidden, state, out, done
    _, hidden, state, out, _ = jax.lax.while_loop(unfinished, body, carry)
    return out[:rows], hidden[:rows], jax.tree.map(lambda x: x[:rows], state)


def decode(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    vocab_size: int,
    sampling: Sampling = FROM_ALL,
    seed: int = 0,
    stop: int = -1,
    enough: Callable[[np.ndarray], bool] | None = None,
) -> np.ndarray:
    """Continue a batch of token sequences.

    A row's result depends on its prompt, its index and the seed, not on the other rows.

    Args:
      model, params: as in docs/architecture.md; params unboxed.
      prompts: B lists of token ids, of any lengths of at least 1.
      tokens: how many to add to each.
      vocab_size: of the tokenizer. The model's vocabulary is padded beyond it; the added ids are never drawn.
      stop: id that ends a row; the rest of the row is filled with it. -1: none.
      enough: called after every BLOCK tokens with all tokens so far [B, n]; all rows end when it returns True.

    Returns:
      [B, tokens] int32; fewer tokens if `enough` ended the rows.

    Raises: UserError for an empty prompt, an id outside the vocabulary or numbers out of range; or if the model's
      logits are not finite, so that there is no token to draw.
    """
    _check(tokens, sampling)
    check_prompts(prompts, vocab_size)
    batch, length = len(prompts), max(len(prompt) for prompt in prompts)
    ids = np.zeros((batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    # Only the cache of an attention model depends on this number. It is rounded up to a power of two, so that few
    # programs are compiled.
    state = fresh_state(model, batch, power_of_two(length + tokens))
    params = rounded(model, params)
    hidden, state = prefill(model, params[0], ids, None if mask.all() else mask, state)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(batch))
    block = min(BLOCK, tokens) if enough else tokens
    static: dict[str, Any] = dict(method=cheapest_method(sampling), room=power_of_two(block))
    out = np.zeros((batch, 0), np.int32)
    while (first := out.shape[1]) < tokens and not (enough and first and enough(out)):
        done, count = (out == stop).any(axis=1), min(block, tokens - first)
        new, hidden, state = draw_tokens(
            model, params, hidden, state, keys, done, sampling, vocab_size, stop, first, count, **static
        )
        drawn = np.asarray(new)[:, :count]
        if (drawn == NO_TOKEN).any():
            row, place = np.argwhere(drawn == NO_TOKEN)[0]
            raise UserError(
                f"the model's logits for token {first + place + 1} of row {row + 1} are not finite (NaN or infinity): "
                "its parameters are not finite, or numbers overflow in its dtype"
            )
        out = np.concatenate([out, drawn], axis=1)
    return out


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises UserError for an empty prompt, or an id that is not from 0 to vocab_size - 1."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("prompt='': must hold at least one token")
    for prompt in prompts:
        if outside := [int(token) for token in prompt if not 0 <= token < vocab_size]:
            raise UserError(f"prompt has the token id {outside[0]}: must be from 0 to {vocab_size - 1}, the vocabulary")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # gives each leaf its own buffer, as the state is donated
def fresh_state(model: nn.Module, batch: int, max_length: int) -> Any:
    """The state of `batch` rows before their first token; attention caches have room for `max_length` tokens."""
    return model.init_state(batch, max_length)


def generate(model: nn.Module, params: Any, tokenizer: Tokenizer, prompt: str, **options: Any) -> str:
    """As `generate_all`, for one prompt."""
    return generate_all(model, params, tokenizer, [prompt], **options)[0]


def generate_all(
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | None = None,
    context: int | None = None,
) -> list[str]:
    """The texts that follow the prompts, side by side: `tokens` tokens, or up to the end of the document or to `stop`.

    Args:
      tokenizer: as in docs/architecture.md. A prompt begins a document, if the tokenizer has a separator.
      temperature, top_k, top_p: as in `Sampling`.
      stop: text at which a result ends; it is left out.
      context: tokens that the model can see, prompt and answer together (`seqmodels.backbone.context`); None: any
        number.

    Raises: UserError for numbers out of range, or if a prompt and its answer exceed the context.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(tokens, sampling)
    begin = [tokenizer.separator] if tokenizer.separator >= 0 else []
    rows = [[*begin, *tokenizer.encode(prompt)] for prompt in prompts]
    if not all(rows):
        raise UserError(
            "the prompt is empty; where tokens have no separator, as in synthetic tasks, it needs one token"
        )
    longest = max(map(len, rows), default=0)
    if context is not None and longest + tokens > context:
        raise UserError(
            f"prompt of {longest} tokens and tokens={tokens} exceed the Transformer's context of {context}: at most "
            f"{max(context - tokens, 0)} tokens of prompt, or tokens={max(context - longest, 0)}, would fit"
        )
    out = decode(
        model,
        params,
        rows,
        tokens=tokens,
        vocab_size=tokenizer.vocab_size,
        sampling=sampling,
        seed=seed,
        stop=tokenizer.separator,
    )
    texts = []
    for row in out:
        ended = np.flatnonzero(row == tokenizer.separator)
        text = tokenizer.decode(row[: ended[0]].tolist() if ended.size else row.tolist())
        texts.append(text.split(stop)[0] if stop else text)
    return texts


def _check(tokens: int, sampling: Sampling) -> None:
    rules = (
        ("tokens", tokens, tokens >= 1, "at least 1"),
        (
            "temperature",
            sampling.temperature,
            np.all((np.asarray(sampling.temperature) >= 0) & np.isfinite(sampling.temperature)),
            "at least 0, and finite",
        ),
        ("top_k", sampling.top_k, np.all(np.asarray(sampling.top_k) >= 0), "at least 0"),
        (
            "top_p",
            sampling.top_p,
            np.all((np.asarray(sampling.top_p) > 0) & (np.asarray(sampling.top_p) <= 1)),
            "in (0, 1]",
        ),
    )
    for name, value, allowed, rule in rules:
        if not allowed:
            raise UserError(f"{name}={value}: must be {rule}")
