"""Small worlds among the sentences of a book: the first three tasks of bAbI (Weston et al. 2015, arXiv 1502.05698), as
BABILong (Kuratov et al. 2024, arXiv 2406.10149) hides them. The simulator is ours, its sentences are theirs."""

import dataclasses

import numpy as np

from seqmodels.data.questions.hay import essay
from seqmodels.data.questions.question import Asked

ACTORS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("kitchen", "garden", "office", "hallway", "bathroom", "bedroom")
THINGS = ("football", "milk", "apple")
MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")


@dataclasses.dataclass(frozen=True)
class World:
    """Attributes:
    facts: how many facts an answer needs. 1: where an actor is. 2: where a thing is. 3: where it was before a place.
    actions: how many sentences tell what happens.
    """

    facts: int = 1
    actions: int = 10

    def ask(self, rng: np.random.Generator) -> Asked:
        while True:
            story, where, history = self._story(rng)
            if self.facts == 1:
                actor = str(rng.choice([a for a in ACTORS if a in where] or [""]))
                if actor:
                    return self._asked(story, f"Where is {actor}?", where[actor])
                continue
            known = [thing for thing in THINGS if len(history[thing]) >= self.facts - 1]
            if not known:
                continue
            thing = str(rng.choice(known))
            if self.facts == 2:
                return self._asked(story, f"Where is the {thing}?", history[thing][-1])
            after, before = history[thing][-1], history[thing][-2]
            if history[thing].count(after) == 1:
                return self._asked(story, f"Where was the {thing} before the {after}?", before)

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        return essay(rng, count)

    def _asked(self, story: list[str], question: str, answer: str) -> Asked:
        introduction = "Facts about a few people are hidden in the following text, in the order in which they happen."
        return Asked(introduction, story, question, "Answer: the", [answer])

    def _story(self, rng: np.random.Generator) -> tuple[list[str], dict[str, str], dict[str, list[str]]]:
        """Sentences, where each actor is, and where each thing has been since it was first taken."""
        where: dict[str, str] = {}
        holder: dict[str, str] = {}
        lies: dict[str, str] = {}
        history: dict[str, list[str]] = {thing: [] for thing in THINGS}
        story: list[str] = []

        def been(thing: str, place: str) -> None:
            if not history[thing] or history[thing][-1] != place:
                history[thing].append(place)

        while len(story) < self.actions:
            actor, thing = str(rng.choice(ACTORS)), str(rng.choice(THINGS))
            place, kind = str(rng.choice(PLACES)), int(rng.integers(0, 4))
            here = where.get(actor)
            if kind >= 2 or self.facts == 1 or here is None:
                if place == here:
                    continue
                where[actor] = place
                story.append(f"{actor} {rng.choice(MOVES)} the {place}.")
                for carried in (t for t, a in holder.items() if a == actor):
                    been(carried, place)
            elif kind == 0 and thing not in holder and lies.get(thing, here) == here:
                holder[thing] = actor
                lies.pop(thing, None)
                story.append(f"{actor} got the {thing} there.")
                been(thing, here)
            elif kind == 1 and holder.get(thing) == actor:
                del holder[thing]
                lies[thing] = here
                story.append(f"{actor} dropped the {thing}.")
        return story, where, history
