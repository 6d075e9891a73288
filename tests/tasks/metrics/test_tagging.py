"""Promises of how tags are read: entities are found however they are written, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from loraloom.tasks.metrics.tagging import Scheme, described, scheme_of

ENTITIES = {
    "IOB2": ["O", "B-PER", "I-PER", "B-LOC"],
    "without an O": ["B-NP", "I-NP", "B-VP"],
    "IOB1, where none begins behind another": ["I-PER", "O", "I-LOC"],
    "IOBES": ["S-PER", "E-PER", "B-PER", "I-PER", "O"],
    "BILOU": ["U-PER", "L-PER", "B-PER", "I-PER", "O"],
    "an underscore": ["B_PER", "I_PER", "O"],
    "at the end": ["PER-B", "PER-I", "O"],
    "at the end, an underscore": ["PER_B", "PER_I", "O"],
    "types with separators": ["B-creative-work", "I-creative-work", "B-a_b", "O"],
    "types with separators, at the end": ["creative-work-B", "creative-work-I", "O"],
    "types that are letters": ["L-B", "L-I", "O"],
    "no types": ["B", "I", "O"],
}
OTHERS = {
    "parts of speech": ["DET", "NOUN", "VERB"],
    "types alone": ["O", "PER", "LOC"],
    "numbers": ["0", "1", "2"],
    "another prefix": ["O", "X-PER", "Y-PER"],
    "two schemes": ["O", "B-PER", "I_PER"],
    "one tag that is none": ["O", "B-PER", "I-PER", "NOUN"],
    "no type": ["O", "B-", "I-"],
    "one letter, and nothing begins": ["S", "V", "O"],
    "languages": ["en", "de", "other"],
    "lower case": ["o", "b-per", "i-per"],
    "nothing but O": ["O"],
}


@pytest.mark.parametrize("tags", ENTITIES.values(), ids=ENTITIES)
def test_tags_of_entities_are_known_by_their_letters(tags: list[str]) -> None:
    assert scheme_of(tags) is not None
    assert "mark entities" in described(tags)


@pytest.mark.parametrize("tags", OTHERS.values(), ids=OTHERS)
def test_tags_that_mark_no_entities_are_not_taken_for_such(tags: list[str]) -> None:
    assert scheme_of(tags) is None
    assert described(tags).startswith(f"the tags ({tags[0]}")
    assert "mark no entities" in described(tags)


def test_every_way_to_write_an_entity_becomes_one() -> None:
    for tags in (["B_PER", "L_PER", "U_PER", "O"], ["PER-B", "PER-L", "PER-U", "O"]):
        scheme = scheme_of(tags)
        assert scheme is not None
        assert scheme.rows([tags, [float("nan")]]) == [["B-PER", "E-PER", "S-PER", "O"], [""]]
    assert Scheme("-", True).plain("a-b-I") == "I-a-b"
    assert scheme_of(["L-B", "L-I"]) == Scheme("-", True)
