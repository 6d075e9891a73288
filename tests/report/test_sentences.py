"""Promises of the sentences: every message has one, and none is left over."""

from __future__ import annotations

import ast
from pathlib import Path

import loraloom
from loraloom.messages import Message
from loraloom.report.sentences import ENGLISH, RUN, SEARCH, sentence
from loraloom.report.verdict_sentences import ADVICE, VERDICT


def kinds() -> set[str]:
    """The kinds of all messages that the source makes."""
    found = set()
    for path in Path(loraloom.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Message", "Warn"):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: the kind is not written out"
                found.add(node.args[0].value)
    return found


def test_every_kind_has_a_sentence_and_every_sentence_its_kind() -> None:
    assert kinds() == set(ENGLISH)
    assert len(ENGLISH) == sum(map(len, (ADVICE, RUN, SEARCH, VERDICT)))  # no kind means two things


def test_another_language_is_another_table() -> None:
    german = {"failed": "Versuch {trial} ist gescheitert: {reason}"}
    failed = Message("failed", trial=3, reason="step 7: the loss is nan, inf")
    assert sentence(failed, german) == "Versuch 3 ist gescheitert: step 7: the loss is nan, inf"
    assert sentence(failed) == "trial 3 failed: step 7: the loss is nan, inf"


def test_a_template_counts_nouns_and_shortens_numbers() -> None:
    table = {"kind": "{rows:row} and {steps:step} at {rate}, {share:.0%} of {names}"}
    message = Message("kind", rows=1, steps=2000, rate=0.000123, share=0.5, names=["a", "b"])
    assert sentence(message, table) == "1 row and 2,000 steps at 1.23e-4, 50% of a, b"
