"""Metrics as functions of predictions and right answers.

Plain Python values in, one float out. Knows no model, no tensors and no names of metrics (``tasks.metrics.registry``).
Shares are from 0 to 1.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import chain
from typing import Any

#: (predictions, right answers) → figure
Measure = Callable[[Sequence[Any], Sequence[Any]], float]

# -- classes ------------------------------------------------------------------------------------------------------


def accuracy(predicted: Sequence[object], right: Sequence[object]) -> float:
    """The share of rows that are right as a whole."""
    return _ratio(sum(a == b for a, b in zip(predicted, right, strict=True)), len(right))


def f1_micro(predicted: Sequence[Collection[Hashable]], right: Sequence[Collection[Hashable]]) -> float:
    """F1 over all labels of all rows."""
    return _f1(*(sum(counts.values()) for counts in _counts(predicted, right)))


def f1_macro(predicted: Sequence[Collection[Hashable]], right: Sequence[Collection[Hashable]]) -> float:
    """The mean of the labels' F1, without labels that are neither predicted nor right anywhere."""
    hits, said, true = _counts(predicted, right)
    labels = said.keys() | true.keys()
    # Sorted, because the order of a sum changes its last bits.
    each = sorted(_f1(hits[label], said[label], true[label]) for label in labels)
    return _mean(each) if each else 0.0


def _counts(
    predicted: Sequence[Collection[Hashable]], right: Sequence[Collection[Hashable]]
) -> tuple[Counter[Hashable], Counter[Hashable], Counter[Hashable]]:
    """By label: hits, predictions, occurrences."""
    hits = Counter(chain.from_iterable(set(a) & set(b) for a, b in zip(predicted, right, strict=True)))
    return hits, Counter(chain.from_iterable(map(set, predicted))), Counter(chain.from_iterable(map(set, right)))


def _f1(hits: int, predicted: int, right: int) -> float:
    return _ratio(2 * hits, predicted + right)


# -- numbers ------------------------------------------------------------------------------------------------------


def mse(predicted: Sequence[float], right: Sequence[float]) -> float:
    return _mean(_squares(predicted, right))


def _squares(predicted: Sequence[float], right: Sequence[float]) -> list[float]:
    # Not ** 2, which raises if the square overflows.
    return [(a - b) * (a - b) for a, b in zip(predicted, right, strict=True)]


def mae(predicted: Sequence[float], right: Sequence[float]) -> float:
    return _mean([abs(a - b) for a, b in zip(predicted, right, strict=True)])


def r2(predicted: Sequence[float], right: Sequence[float]) -> float:
    """The explained share of the variance: below 0 if worse than the mean, NaN if all right values are equal."""
    if _constant(right):
        return math.nan
    spread = math.fsum(_squares([_mean(right)] * len(right), right))
    return 1 - math.fsum(_squares(predicted, right)) / spread if spread else math.nan


def pearson(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation; NaN if either side is constant or not finite."""
    if not all(map(math.isfinite, chain(predicted, right))) or _constant(predicted) or _constant(right):
        return math.nan
    a, b = _centred(predicted), _centred(right)
    size = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return max(-1.0, min(1.0, math.fsum(x * y for x, y in zip(a, b, strict=True)) / size)) if size else math.nan


def _constant(values: Sequence[float]) -> bool:
    """True if all values are equal but for rounding, whose correlation would mean nothing."""
    if not all(map(math.isfinite, values)) or not values:
        return False
    return max(values) - min(values) <= 1e-13 * max(map(abs, values))


def _centred(values: Sequence[float]) -> list[float]:
    """Differences from the mean, divided by the largest value so that no square overflows or underflows."""
    largest = max(map(abs, values))
    scaled = [value / largest for value in values]
    mean = _mean(scaled)
    return [value - mean for value in scaled]


def spearman(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's correlation of ranks; equal values share the mean of their ranks."""
    if not all(map(math.isfinite, chain(predicted, right))):
        return math.nan
    return pearson(_ranks(predicted), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or values[order[stop]] != values[order[start]]:
            for place in order[start:stop]:
                ranks[place] = (start + stop - 1) / 2
            start = stop
    return ranks


# -- entities -----------------------------------------------------------------------------------------------------

Entity = tuple[str, int, int]


def entities(tags: Sequence[str]) -> set[Entity]:
    """(type, first word, last word) of each entity in IOB2 tags (``B-PER``, ``I-PER``, ``O``), or IOBES.

    As in conlleval and seqeval, an ``I-`` after another type begins an entity. Any other tag is outside.
    """
    found: set[Entity] = set()
    kind, start, last = "", 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        prefix = prefix if prefix in ("B", "I", "E", "S") else "O"
        if last != "O" and (prefix in ("O", "B", "S") or last in ("E", "S") or name != kind):
            found.add((kind, start, place - 1))
            last = "O"
        if prefix != "O" and last == "O":
            kind, start = name, place
        last = prefix
    return found


def entity_precision(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> float:
    hits, said, _ = _entity_counts(predicted, right)
    return _ratio(hits, said)


def entity_recall(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> float:
    hits, _, true = _entity_counts(predicted, right)
    return _ratio(hits, true)


def entity_f1(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> float:
    return _f1(*_entity_counts(predicted, right))


def _entity_counts(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> tuple[int, int, int]:
    pairs = [(entities(a), entities(b)) for a, b in zip(predicted, right, strict=True)]
    return sum(len(a & b) for a, b in pairs), sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)


def by_word(measure: Measure) -> Measure:
    """``measure`` over the words of all rows, each with one tag."""
    return lambda predicted, right: measure(*([(tag,) for row in side for tag in row] for side in (predicted, right)))


def single(measure: Measure) -> Measure:
    """``measure`` of several labels for rows with one class each."""
    return lambda predicted, right: measure(*([(label,) for label in side] for side in (predicted, right)))


# -- answers ------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """As in SQuAD's official script: lower case, without punctuation, articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def answer_exact(predicted: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """The share that equals one of the right answers, normalised. If there are none, ``""`` is right."""
    return _best(predicted, right, lambda a, b: float(normalised(a) == normalised(b)))


def answer_f1(predicted: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """The mean F1 of words, normalised, with the closest right answer of each."""
    return _best(predicted, right, _shared_words)


def _best(predicted: Sequence[str], right: Sequence[Sequence[str]], score: Callable[[str, str], float]) -> float:
    best = []
    for said, answers in zip(predicted, right, strict=True):
        if not isinstance(said, str):  # NaN means no prediction, not an empty answer
            best.append(0.0)
            continue
        kept = [answer for answer in answers if normalised(answer)] or [""]
        best.append(max(score(said, answer) for answer in kept))
    return _mean(best)


def _shared_words(predicted: str, right: str) -> float:
    a, b = normalised(predicted).split(), normalised(right).split()
    if not a or not b:
        return float(a == b)
    return _f1((Counter(a) & Counter(b)).total(), len(a), len(b))


# -- texts --------------------------------------------------------------------------------------------------------

#: Words of letters and digits; single characters in scripts without spaces between words.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def text_exact(predicted: Sequence[str], right: Sequence[str]) -> float:
    """The share that equals the text, except for spaces around it."""
    return accuracy([text.strip() for text in predicted], [text.strip() for text in right])


def rouge_l(predicted: Sequence[str], right: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): the mean F1 of the longest common subsequence of words, without stemming."""
    pairs = [(_words(a), _words(b)) for a, b in zip(predicted, right, strict=True)]
    return _mean([_f1(_common(a, b), len(a), len(b)) for a, b in pairs])


def rouge_n(predicted: Sequence[str], right: Sequence[str], n: int) -> float:
    """ROUGE-n (Lin 2004): the mean F1 of shared sequences of ``n`` words, without stemming."""
    pairs = [(_runs(_words(a), n), _runs(_words(b), n)) for a, b in zip(predicted, right, strict=True)]
    return _mean([_f1((a & b).total(), a.total(), b.total()) for a, b in pairs])


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _runs(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for place, other in enumerate(b, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    try:
        return math.fsum(values) / len(values) if values else math.nan
    except OverflowError:  # of the sum, while the mean may be finite
        return math.fsum(value / len(values) for value in values)
