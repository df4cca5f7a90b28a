"""Writes questions about long texts, as JSON lines for the evaluator `qa`.

  python -m seqmodels.data.questions --tasks=niah_single_1,vt --lengths=1024,2048 --rows=50 --out=questions
  python eval.py --workdir=runs/mamba --evals=qa --config.evaluation.qa='questions/*.jsonl'

writes questions/<task>_<length>.jsonl. Texts are as long as fits into so many tokens with the question and its answer.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from seqmodels.data.questions import TASKS, line
from seqmodels.data.tokenizer import Tokenizer, load_tokenizer
from seqmodels.errors import UserError


def longest(name: str, tokenizer: Tokenizer, seed: list[int], length: int) -> dict[str, Any]:
    """A question of a task with as much hay as fits into `length` tokens, its answer among them.

    Raises: UserError if the question alone does not fit.
    """
    shortest = float("inf")  # tokens of the shortest question that was tried

    def some(count: int) -> dict[str, Any] | None:
        nonlocal shortest
        try:
            fields = line(TASKS[name], seed, count)
        except UserError:  # too short for this task, or longer than it can be
            return None
        text = f"{fields['context']}\n\n{fields['question']}\n{fields['answer_prefix']} {', '.join(fields['answers'])}"
        tokens = len(tokenizer.encode(text))
        shortest = min(shortest, tokens)
        return fields if tokens < length else None

    count, step, best = 0, 1, some(0)
    while step:  # first in steps that double, then in steps that halve
        found = some(count + step)
        if found is not None:
            count, best, step = count + step, found, 2 * step
        elif best is None and step < length:
            step *= 2
        else:
            break
    while step:
        step //= 2
        if step and (found := some(count + step)) is not None:
            count, best = count + step, found
    if best is None:
        raise UserError(f"--lengths={length}: must be at least {shortest + 1} for --tasks={name}")
    return best


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.data.questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"apart by commas: {', '.join(TASKS)}")
    parser.add_argument("--lengths", default="1024", help="most tokens of a text with its question, apart by commas")
    parser.add_argument("--rows", type=int, default=100, help="questions of each task and length")
    parser.add_argument("--tokenizer", default="bytes", help="in whose tokens lengths are, as config.data.tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    options = parser.parse_args(argv)
    try:
        for name in (names := options.tasks.split(",")):
            if name not in TASKS:
                raise UserError(f"--tasks={name}: must be one or more of {', '.join(TASKS)}")
        if not all(part.isdecimal() and int(part) for part in options.lengths.split(",")):
            raise UserError(f"--lengths={options.lengths}: must be numbers of tokens, apart by commas")
        if options.rows < 1:
            raise UserError(f"--rows={options.rows}: must be at least 1")
        tokenizer = load_tokenizer(options.tokenizer)
        files = [(name, int(length)) for name in names for length in options.lengths.split(",")]
        for name, length in files:  # before anything is written
            longest(name, tokenizer, [options.seed, *name.encode(), 0], length)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, length in files:
            seeds = ([options.seed, *name.encode(), row] for row in range(options.rows))
            lines = [json.dumps(longest(name, tokenizer, seed, length)) + "\n" for seed in seeds]
            path = options.out / f"{name}_{length}.jsonl"
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{path}: {len(lines)} questions")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
