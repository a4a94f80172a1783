"""Guesses at what a sequence will say, checked several tokens at a time (speculative decoding, arXiv 2211.17192).

A row that is trained on in every epoch answers much as it did last time, and its last answer costs nothing to propose. A pass
over few rows takes hardly longer with several tokens a row, so every token that is guessed right is almost free. Because the
sampling noise of a sequence is fixed by its seed, a guess is checked by choosing that position's token as ever: the answer does
not depend on the guesses.
"""

from dataclasses import dataclass

MOST_TOKENS = 7
ROWS_OF_A_PASS = 24
"""A pass reads at most so many tokens of all rows: beyond that its time grows with them."""
TRIAL = 24
"""Guesses after which a batch judges its drafts."""
LEAST_LUCK = 0.25
"""The share of right guesses below which drafts cost more than they save."""
LONGEST_CONTEXT = 3


@dataclass
class DraftLuck:
    """How often a batch's drafts were right, and so how many tokens its rows propose at a time."""

    proposed: int = 0
    right: int = 0

    def observe(self, proposed: int, right: int) -> None:
        self.proposed += proposed
        self.right += right

    def width(self, rows: int) -> int:
        """Tokens that each of so many rows may propose; 0: decode one by one."""
        if self.proposed >= TRIAL and self.right < LEAST_LUCK * self.proposed:
            return 0
        return max(0, min(MOST_TOKENS, ROWS_OF_A_PASS // rows - 1))


def next_tokens(draft: list[int], said: list[int], count: int) -> list[int]:
    """At most `count` tokens that follow in the draft: as long as it was right, the next ones; after a difference, those after
    the place where the last tokens said, as many as are found, stand in it. Nothing where it has no such place."""
    if count <= 0 or not draft:
        return []
    if len(said) < len(draft) and draft[: len(said)] == said:
        return draft[len(said) : len(said) + count]
    places = _places(draft, said[-1]) if said else []
    for length in range(min(LONGEST_CONTEXT, len(said)), 0, -1):
        for place in places:
            start = place - length + 1
            if start >= 0 and draft[start:place] == said[-length:-1]:
                return draft[place + 1 : place + 1 + count]
    return []


def _places(draft: list[int], token: int) -> list[int]:
    """Where a token stands in it, the last place left out, after which nothing follows."""
    found: list[int] = []
    place = -1
    while True:
        try:
            place = draft.index(token, place + 1, len(draft) - 1)
        except ValueError:
            return found
        found.append(place)
