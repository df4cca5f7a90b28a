"""Speed and memory of text generation on one device, for prompts of several lengths and batches of several sizes.

What is measured is greedy decoding with `seqmodels.generation`: it reads the prompts in chunks, then draws one token
after another.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType
from ml_collections import ConfigDict

from seqmodels import compiled, generation
from seqmodels.errors import UserError
from seqmodels.evals import memory
from seqmodels.evals.run import Run, RunData
from seqmodels.rounding import rounded
from seqmodels.training import sharding

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def measure(
    model: nn.Module, params: Any, *, prompt: int, batch: int, tokens: int, repeats: int, vocab_size: int
) -> dict:
    """Figures of one size.

    Args:
      model, params: as in docs/architecture.md; params unboxed, on one device.
      prompt: its length in tokens.
      batch: prompts at once.
      tokens: new tokens for each.
      repeats: number of timings, of which the median is taken. One more comes first and is not counted.
      vocab_size: of the tokenizer.

    Returns:
      prefill_tokens_per_second, decode_tokens_per_second: of all prompts together. decode_ms: of one step.
      compile_seconds: for the programs that were not yet compiled for an earlier size. state_bytes: state of all
      prompts after the last token. planned_bytes: memory of the largest program, as the compiler planned it.
      peak_bytes: most memory that the process has used on the device so far; None on CPUs.
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, (batch, prompt), dtype=np.int32)
    keys = jax.random.split(jax.random.key(0), batch)
    model_params = rounded(model, params)
    slots = generation.power_of_two(prompt + tokens)
    sizes = dict(method="greedy", room=generation.power_of_two(tokens))

    def start():
        return generation.fresh_state(model, batch, slots)

    def prefill(state):
        return generation.prefill(model, model_params[0], ids, None, state)

    def decode_arguments(hidden, state):
        done, sampling = np.zeros(batch, bool), generation.Sampling(0.0)
        return model, model_params, hidden, state, keys, done, sampling, vocab_size, -1, 0, tokens

    programs, compile_seconds = [], 0.0

    def compile(function, *arguments, **static):
        nonlocal compile_seconds
        begun = time.perf_counter()
        lowered = function.lower(*arguments, **static)
        with compiled.paused():
            programs.append(lowered.compile())  # and the call of the same function finds it compiled
            memory.check(programs[-1])
        compile_seconds += time.perf_counter() - begun

    for size in sorted(set(generation.chunks(prompt))):
        compile(generation.read_chunk, model, model_params[0], ids[:, :size], None, start())
    compile(generation.draw_tokens, *decode_arguments(*prefill(start())), **sizes)

    seconds = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(start())
        first = time.perf_counter()
        hidden, state = jax.block_until_ready(prefill(state))
        second = time.perf_counter()
        *_, state = jax.block_until_ready(generation.draw_tokens(*decode_arguments(hidden, state), **sizes))
        seconds.append((second - first, time.perf_counter() - second))
    prefill_seconds, decode_seconds = (statistics.median(part) for part in zip(*seconds[1:], strict=True))
    return dict(
        prefill_tokens_per_second=batch * prompt / prefill_seconds,
        decode_tokens_per_second=batch * tokens / decode_seconds,
        decode_ms=1e3 * decode_seconds / tokens,
        compile_seconds=compile_seconds,
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        planned_bytes=max(memory.planned_bytes(program) or 0 for program in programs),
        peak_bytes=memory.peak_bytes(jax.tree.leaves(params)[0].device),
    )


def check(config: ConfigDict) -> None:
    """Raises UserError for sizes that cannot be measured."""
    sizes = config.evaluation.throughput
    for name in ("contexts", "batches", "tokens", "repeats"):
        values = sizes[name] if isinstance(sizes[name], tuple | list) else (sizes[name],)
        if not values or not all(isinstance(value, int) and value >= 1 for value in values):
            raise UserError(f"config.evaluation.throughput.{name}={sizes[name]!r}: must be at least 1")


def serves(run: RunData) -> bool:
    """Every model that continues tokens can be timed, whatever it was trained on."""
    return run.dataset.measured_by != "head" and run.config.model.head == "next_token"


def evaluate_run(run: Run, splits: list[str], limit: int | None) -> dict:
    """The figures by context and batch size, in rising order. Splits and limit are not used."""
    sizes = run.config.evaluation.throughput
    device = jax.local_devices()[0]
    if jax.process_count() > 1:
        raise UserError("--evals=throughput: measures one device; run it in a single process")
    mesh = jax.make_mesh((1,) * 5, sharding.AXES, axis_types=(AxisType.Auto,) * 5, devices=[device])
    points: dict[str, dict] = {}
    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, device)
        for context in sorted({run.config.seq_len * n for n in sizes.contexts}):
            for batch in sorted(set(sizes.batches)):
                points.setdefault(str(context), {})[str(batch)] = memory.served(
                    functools.partial(
                        measure,
                        run.model,
                        params,
                        prompt=context,
                        batch=batch,
                        tokens=sizes.tokens,
                        repeats=sizes.repeats,
                        vocab_size=run.dataset.tokenizer.vocab_size,
                    )
                )
    return {"throughput": points, "throughput_device": device.device_kind}


def _points(result: dict):
    """Yields (context, batch size, figures)."""
    for context, by_batch in result["throughput"].items():
        for batch, figures in by_batch.items():
            yield int(context), int(batch), figures


COLUMNS: dict[str, Callable[[dict], str]] = {
    "prefill tok/s": lambda f: f"{f['prefill_tokens_per_second']:,.0f}",
    "decode tok/s": lambda f: f"{f['decode_tokens_per_second']:,.0f}",
    "ms a step": lambda f: f"{f['decode_ms']:.3f}",
    "state": lambda f: _bytes(f["state_bytes"]),
    "planned": lambda f: _bytes(f["planned_bytes"]),
    "peak": lambda f: _bytes(f["peak_bytes"]),
    "compiled in": lambda f: f"{f['compile_seconds']:.1f} s",
}


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def table(result: dict) -> str:
    lines = [f"{result['throughput_device']}", f"{'context':>8}{'batch':>7}" + "".join(f"{n:>15}" for n in COLUMNS)]
    for context, batch, figures in _points(result):
        reason = figures.get("not_served")
        cells = f"   {reason}" if reason else "".join(f"{show(figures):>15}" for show in COLUMNS.values())
        lines.append(f"{context:>8}{batch:>7}{cells}")
    return "\n".join(lines)


def _plot(axes, result: dict, lines: dict[str, tuple[str, str]]) -> None:
    """Draws figures over the context, one colour for each batch size. lines: figure to its line style and label."""
    served = [point for point in _points(result) if "not_served" not in point[2]]
    for number, size in enumerate(dict.fromkeys(batch for _, batch, _ in served)):
        chosen = [(context, figures) for context, batch, figures in served if batch == size]
        for name, (style, label) in lines.items():
            axes.plot(
                [context for context, _ in chosen],
                [figures[name] for _, figures in chosen],
                style,
                color=f"C{number}",
                label=f"{label}, batch {size}",
            )
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="tokens of the prompt")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.margins(y=0.25)  # room for the legend
    if served:
        axes.legend(fontsize="small", ncols=2, framealpha=0.5)


def plot_speed(axes: "Axes", result: dict) -> None:
    _plot(axes, result, {"prefill_tokens_per_second": ("o-", "prefill"), "decode_tokens_per_second": ("s--", "decode")})
    axes.set(ylabel="tokens a second", title=f"speed, {result['throughput_device']}")


def plot_memory(axes: "Axes", result: dict) -> None:
    _plot(axes, result, {"planned_bytes": ("o-", "largest program"), "state_bytes": ("s--", "state")})
    axes.set(ylabel="bytes", title="memory")


PLOTS = (plot_speed, plot_memory)
