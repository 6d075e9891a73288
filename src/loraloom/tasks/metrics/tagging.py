"""Tag schemes of token-cls: whether tags mark entities, and which letter of a tag means begin, inside or end."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

#: The tag outside of entities, and the letters inside: begin, inside, end or last, single or unit.
OUTSIDE, LETTERS = "O", "BIELSU"
#: BILOU's letters in those of IOBES.
_AS_IOBES = {"L": "E", "U": "S"}


@dataclass(frozen=True)
class Scheme:
    """Tags such as ``B-PER``, or ``PER-B`` with ``suffix``. Without a separator the tag is the letter alone."""

    separator: str
    suffix: bool = False

    def parts(self, tag: str) -> tuple[str, str] | None:
        """(letter, type) of a tag; None if it does not follow the scheme."""
        if not self.separator:
            return (tag, "") if tag in LETTERS and len(tag) == 1 else None
        split = tag.rpartition if self.suffix else tag.partition
        first, _, last = split(self.separator)
        letter, kind = (last, first) if self.suffix else (first, last)
        return (letter, kind) if kind and len(letter) == 1 and letter in LETTERS else None

    def plain(self, tag: str) -> str:
        """The tag as ``B-PER``, ``I-PER``, ``E-PER``, ``S-PER`` or ``O``."""
        found = self.parts(tag)
        return f"{_AS_IOBES.get(found[0], found[0])}-{found[1]}" if found else OUTSIDE

    def rows(self, rows: Iterable[Iterable[object]]) -> list[list[str]]:
        """``plain`` of all tags of all rows; NaN, which stands for no prediction, becomes ``""``."""
        known: dict[str, str] = {}

        def plain(tag: object) -> str:
            if not isinstance(tag, str):
                return ""
            return known[tag] if tag in known else known.setdefault(tag, self.plain(tag))

        return [[plain(tag) for tag in row] for row in rows]


def scheme_of(tags: Collection[str]) -> Scheme | None:
    """The scheme that all ``tags`` follow; None if they mark no entities, such as parts of speech.

    IOB1, IOB2, IOE, IOBES and BILOU are read, with ``-`` or ``_`` and the letter first or last. Of two readings the
    one with B or I letters counts: ``L-B`` and ``L-I`` are of type L.
    """
    inside = [tag for tag in tags if tag != OUTSIDE]
    fitting: list[tuple[bool, Scheme]] = []
    for scheme in (Scheme("-"), Scheme("_"), Scheme("-", True), Scheme("_", True)):
        found = [scheme.parts(tag) for tag in inside]
        if found and None not in found:
            fitting.append((any(part is not None and part[0] in "BI" for part in found), scheme))
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]  # the first of equals
    alone = set(tags) >= {OUTSIDE, "B"} and all(Scheme("").parts(tag) for tag in inside)
    return Scheme("") if alone else None


def described(tags: Collection[str]) -> str:
    """A sentence on what is measured of these tags."""
    if scheme_of(tags) is not None:
        return "the tags mark entities: f1, precision and recall are of whole entities, accuracy is of words"
    some = ", ".join(re.sub(r"\s+", " ", tag) for tag in list(tags)[:3])
    more = ", ..." if len(tags) > 3 else ""
    return (
        f"the tags ({some}{more}) mark no entities (B-x, I-x, O): each word counts by itself, in accuracy, f1_macro "
        "and f1_micro"
    )
