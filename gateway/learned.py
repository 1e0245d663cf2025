"""What answers have taught: how many bytes a token of a model has, and how long its answers to a team are.

Both forget: a report that is some hundred requests old weighs little. The length that is expected is the one that 95 of
100 answers have at most, with the next answer counted among the longer ones (conformal prediction; with weights that
fall: Barber, Candès, Ramdas and Tibshirani, Annals of Statistics 51, 2023). So, from the twentieth answer on and while
answers stay as they are, at most 5 in 100 are longer, however much was forgotten.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict

from gateway.bounds import BYTES_PER_TOKEN

_MOST = 10_000  # models, and pairs of team and model, that are kept; the one that was not reported longest goes
_LEAST_SEEN = 20  # answers; fewer do not tell what 1 in 20 is

_FORGETS = 1 / 128  # of what is known of a model, with each request
_START = 4096  # bytes that are taken for known of a model before anything was
_LONGEST_TEXT = 64 * 1024  # bytes that a report tells of at most, so that none buries all others
_DENSEST, _SPARSEST = 0.5, 16.0  # bytes per token; beyond it is no text, or no count
_FARTHEST = 2.0  # times what is known, or one such part of it: what a report says beyond is not taken at its word

_KEPT = 1 - 1 / 256  # of the weight of an answer, with each that follows
_ABOVE = 0.05  # of the answers may be longer than what is expected
_HEAVY = 1e100  # a weight at which all of them are made light again

# The upper ends of the classes of lengths, four to an octave, as far as usage is credible (usage.py).
_EDGES = tuple(sorted({0, *(round(2 ** (i / 4)) for i in range(121))}))

_LAST = len(_EDGES) - 1
_LONGEST = _EDGES[-1]


class Learned:
    """What one worker learned of models and teams from the answers that it saw."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, _Texts] = OrderedDict()
        self._lengths: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Learned of {len(self._texts)} models, {len(self._lengths)} pairs of team and model>"

    def bytes_per_token(self, model: str) -> float:
        """The bytes of text that a token of the model's input stands for; 4.0 until learned."""
        texts = self._texts.get(model)
        return BYTES_PER_TOKEN if texts is None else texts.size / texts.tokens

    def expected_output(self, team: str, model: str) -> int | None:
        """The tokens that 95 of 100 answers to the team have at most, rounded up by up to a fifth; None: not known."""
        lengths = self._lengths.get((team, model))
        return None if lengths is None or lengths.seen < _LEAST_SEEN else _EDGES[lengths.place]

    def learn(
        self, team: str, model: str, *, input_bytes: int, input_tokens: int, output_tokens: int, answers: int
    ) -> None:
        """Take in what the backend reported of one request; 0 bytes or answers where nothing can be told of them."""
        if input_bytes > 0 and input_tokens > 0:
            if (texts := self._texts.get(model)) is None:
                texts = self._texts[model] = _Texts()
                _trim(self._texts)
            else:
                self._texts.move_to_end(model)
            texts.add(input_bytes, input_tokens)
        if answers > 0:
            pair = (team, model)
            if (lengths := self._lengths.get(pair)) is None:
                lengths = self._lengths[pair] = _Lengths()
                _trim(self._lengths)
            else:
                self._lengths.move_to_end(pair)
            lengths.add(-(-output_tokens // answers))


def _trim(kept: OrderedDict[str, _Texts] | OrderedDict[tuple[str, str], _Lengths]) -> None:
    if len(kept) > _MOST:
        kept.popitem(last=False)


class _Texts:
    """The bytes and the tokens of a model's inputs, the older the fewer."""

    __slots__ = ("size", "tokens")

    def __init__(self) -> None:
        self.size = float(_START)
        self.tokens = _START / BYTES_PER_TOKEN

    def add(self, size: float, tokens: float) -> None:
        told, known = size / tokens, self.size / self.tokens
        if not known / _FARTHEST <= told <= known * _FARTHEST:
            told = known / _FARTHEST if told < known else known * _FARTHEST
        if not _DENSEST <= told <= _SPARSEST:
            told = _DENSEST if told < _DENSEST else _SPARSEST
        if size > _LONGEST_TEXT:
            size = _LONGEST_TEXT
        self.size += size - self.size * _FORGETS
        self.tokens += size / told - self.tokens * _FORGETS


class _Lengths:
    """How long answers were, in classes whose weights fall; and the class that 95 of 100 do not exceed.

    Instead of all old weights falling, the new one grows. `place` moves by a class or two with each answer, so that
    nothing is ever summed up to find it.
    """

    __slots__ = ("_above", "_total", "_weight", "_weights", "place", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.place = 0
        self._weight = 1.0  # of the next answer
        self._weights = array("d", bytes(8 * len(_EDGES)))
        self._total = 0.0
        self._above = 0.0  # of the total, in classes above the place

    def add(self, length: int) -> None:
        self.seen += 1
        weight, weights = self._weight, self._weights
        found = bisect_left(_EDGES, length) if length < _LONGEST else _LAST
        weights[found] += weight
        self._total += weight
        if found > self.place:
            self._above += weight
        self._weight = weight = weight / _KEPT
        allowed = _ABOVE * (self._total + weight) - weight  # the next answer may be longer, too
        place, above = self.place, self._above
        while above > allowed and place < _LAST:
            place += 1
            above -= weights[place]
        while place > 0 and above + weights[place] <= allowed:
            above += weights[place]
            place -= 1
        self.place, self._above = place, above
        if weight > _HEAVY:
            self._lighten()

    def _lighten(self) -> None:
        for i, weight in enumerate(self._weights):
            self._weights[i] = weight / self._weight
        self._weight = 1.0
        self._total = sum(self._weights)
        self._above = sum(self._weights[self.place + 1 :])
