"""Text that has nothing to do with a question, and words and names for needles."""
# ruff: noqa: SIM905 (words are easier to read without quotes)

import functools
import re

import numpy as np

from seqmodels.data.text import EMBEDDED
from seqmodels.errors import UserError

NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]

ADJECTIVES = """
able ancient angry bitter bold brave brief bright broad calm careful cheap clean clever cold cruel curious dark
deep dense dry eager early empty exact fair faint fast fierce firm fresh gentle glad golden grand hollow honest
huge humble idle keen kind lazy light little lively lonely loose loud lucky mellow mild modest narrow neat noble
odd pale plain polite proud pure quick quiet rapid rare rough round rude sharp short shy silent silver simple
slow smooth soft solid steep stiff strange strict strong sudden sweet swift tall thick thin tidy tiny tough
vague vast warm weak wild wise wooden young
""".split()
NOUNS = """
anchor apple arrow basket beacon bell blanket bottle bridge bucket button cabin candle canyon carpet castle
cellar chain chair circle clock cloud coat copper corner cottage cradle curtain desert diamond drum eagle engine
feather fence field flute forest fountain garden glacier glove hammer harbor hatchet hedge helmet hill island
jacket kettle ladder lantern ledger lemon letter lizard marble meadow mirror morning mountain needle notebook
orchard otter oven paddle parcel pebble pencil pepper piano pillow planet pocket quarry rabbit ribbon river
saddle sailor shadow shovel signal spider staircase stone stove summer tailor temple thunder ticket timber tower
tractor tunnel turtle valley velvet village violin wagon walnut whistle window winter
""".split()
FIRST = """
Ada Alan Alice Amos Anna Arthur Beatrice Ben Clara Conrad Daniel Dora Edgar Elena Emil Esther Felix Flora Frank
Grace Gustav Hannah Henry Ida Irene Jacob Jane Karl Laura Leo Lydia Marcus Martha Nora Oscar Paula Peter Rosa
Samuel Sophie Theo Victor
""".split()
LAST = """
Abbott Baker Barlow Bishop Carter Chapman Clarke Cooper Dalton Fisher Fletcher Foster Gardner Gibson Graham
Harper Hayes Holmes Hudson Hunter Keller Lambert Mason Mercer Miller Morton Norris Palmer Parker Porter Quincy
Reeves Sawyer Shepherd Slater Spencer Tanner Turner Walker Warner Weaver Wright
""".split()


def noise(count: int) -> list[str]:
    """The same five sentences again and again."""
    return [NOISE[i % len(NOISE)] for i in range(count)]


@functools.cache
def _sentences() -> list[str]:
    """Sentences of the text that comes with the project: its last tenth, which is the test split's."""
    import lzma

    text = lzma.decompress(EMBEDDED.read_bytes()).decode()
    words = " ".join(text[-len(text) // 10 :].split())
    return [s for s in re.split(r"(?<=[.!?]) ", words) if 20 < len(s) < 300]


def essay(rng: np.random.Generator, count: int) -> list[str]:
    """Sentences of a novel from a random place on, which go on at its beginning after its end."""
    sentences = _sentences()
    first = int(rng.integers(len(sentences)))
    return [sentences[(first + i) % len(sentences)] for i in range(count)]


def different(rng: np.random.Generator, first: list[str], second: list[str], count: int, join: str = "-") -> list[str]:
    """`count` different pairs of a word of each list. Raises UserError if there are not so many."""
    if count > len(first) * len(second):
        raise UserError(f"there are {len(first) * len(second):,} different names, and not {count:,}: make it shorter")
    chosen = rng.choice(len(first) * len(second), count, replace=False)
    return [f"{first[i // len(second)]}{join}{second[i % len(second)]}" for i in chosen]
