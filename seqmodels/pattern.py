"""The pattern language: which branches a block has, and how blocks follow one another.

    mamba                     a block of one branch: x + mamba(norm(x))
    attention+mlp             branches one after the other, each with a norm and a sum of its own
    attention|mlp             branches side by side, on the same normed input
    bi:mamba                  the branch in both directions of time
    mamba mamba attention+mlp blocks, from bottom to top
    mamba+mlp x3              the block before it three times; (mamba attention+mlp) x3 the group
    attention@4/8             in place of the first branch of block 4 and of every eighth after it, counted from 0
    +moe@1/2                  the same for what stands behind the first "+"

So Jamba's eight layers are "(mamba+mlp) x8 attention@4/8 +moe@1/2". Imports no JAX.
"""

import re
from difflib import get_close_matches
from typing import NoReturn

from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.fields.field import shown

Step = tuple[str, ...]  # branches side by side, such as ("attention", "mlp") or ("bi:mamba",)
Block = tuple[Step, ...]  # steps one after the other

BOTH_WAYS = "bi:"
MOST_BLOCKS = 10_000  # of a model
TOKEN = re.compile(r"[()]|[^\s()]+")


def name_of(word: str) -> str:
    """The branch's name in BRANCHES: "mamba" of "bi:mamba"."""
    return word.removeprefix(BOTH_WAYS)


def names(pattern: str) -> list[str]:
    """Names of all branches of a pattern, each once, in order. Raises UserError as `parse` does."""
    words = (word for block in parse(pattern) for step in block for word in step)
    return list(dict.fromkeys(map(name_of, words)))


def parse(pattern: str) -> list[Block]:
    """Blocks of one group, from bottom to top. Raises UserError that points at the word that is wrong."""
    if not isinstance(pattern, str):
        raise UserError(f"config.model.pattern={shown(pattern)}: must be a text, such as 'mamba'")
    return _Parser(pattern).blocks()


class _Parser:
    def __init__(self, pattern: str):
        self.pattern = pattern
        # "x 3" is "x3"
        self.tokens = TOKEN.findall(re.sub(r"(?<![^\s)])x\s+(?=\d+(?:\s|$|\)))", "x", pattern))
        self.place = 0

    def refuse(self, token: str, allowed: str, part: str = "") -> NoReturn:
        """`part`: what of the word is wrong, if not all of it."""
        where = (
            f"{part!r} of word {self.place}, {token!r}," if part != token and part else f"word {self.place}, {token!r},"
        )
        raise UserError(f"config.model.pattern={shown(self.pattern)}: {where if token else 'it'} must be {allowed}")

    def blocks(self) -> list[Block]:
        blocks = self.group(closing=False)
        if not blocks:
            self.refuse("", "at least one block, such as 'mamba' or 'attention+mlp'")
        return blocks

    def group(self, closing: bool) -> list[Block]:
        """Blocks up to the end, or to the parenthesis that closes the group."""
        blocks: list[Block] = []
        last = 0  # blocks that a repetition would repeat: those of the block or group before it
        while self.place < len(self.tokens):
            token = self.tokens[self.place]
            self.place += 1
            if token == ")":
                if not closing:
                    self.refuse(token, "behind a '(' that it closes")
                return blocks
            if token == "(":
                new = self.group(closing=True)
                if not new:
                    self.refuse(token, "before at least one block")
            elif re.fullmatch(r"x\d+", token):
                if not last or not token[1:].isascii() or not 1 <= int(token[1:8]) <= MOST_BLOCKS or len(token) > 7:
                    self.refuse(token, f"behind the block that it repeats, and from x1 to x{MOST_BLOCKS}")
                if len(blocks) + last * int(token[1:]) > MOST_BLOCKS:
                    self.refuse(token, f"in a pattern of at most {MOST_BLOCKS} blocks")
                new = blocks[-last:] * (int(token[1:]) - 1)
                last = 0
                blocks += new
                continue
            elif "@" in token:
                self.replace(token, blocks)
                last = 0
                continue
            else:
                new = [self.block(token)]
            blocks += new
            last = len(new)
        if closing:
            self.refuse("(", "closed by a ')'")
        return blocks

    def block(self, token: str) -> Block:
        return tuple(self.step(token, step) for step in token.split("+"))

    def step(self, token: str, text: str) -> Step:
        words = tuple(text.split("|"))
        for word in words:
            name = name_of(word)
            if name not in BRANCHES:
                near = get_close_matches(name, list(BRANCHES), n=1, cutoff=0.4)
                guess = f"; did you mean {near[0]!r}?" if near else ""
                self.refuse(token, f"one of {', '.join(BRANCHES)}{guess}", part=name or "nothing")
        return words

    def replace(self, token: str, blocks: list[Block]) -> None:
        """`name@offset/period`, or with "+" before it for the second step, in place in `blocks`."""
        match = re.fullmatch(r"(\+?)([^@+]+)@(\d+)/(\d+)", token)
        if not match:
            self.refuse(token, "a branch @ the first block / the period, such as attention@4/8 or +moe@1/2")
        offset, period, at = int(match[3]), int(match[4]), len(match[1])
        step = self.step(token, match[2])
        if not offset < period <= len(blocks):
            self.refuse(token, f"at a block below the period, and the period at most {len(blocks)}, the blocks so far")
        for i in range(offset, len(blocks), period):
            if len(blocks[i]) <= at:
                self.refuse(token, f"where there is something to replace; block {i} has nothing behind a '+'")
            blocks[i] = (*blocks[i][:at], step, *blocks[i][at + 1 :])
