"""Where one turn of the assistant starts and ends in the text that a template renders with marks for words.

This file asks a template: with and without the generation prompt, up to the turn and beyond it, with another answer in
its place, with another speaker after it. It does not know rows or token ids.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loraloom.data.tokenize.placeholders import MARK, TAG, numbers, said_in
from loraloom.data.tokenize.templates import TOOL, Template
from loraloom.errors import DataError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraloom.data.records import Message

#: Words of a sample answer, to see what the template renders before and after them.
PROBE = "JqvProbeqvJ"

#: Words of the user before the sample answer, and after it.
ASKED, NEXT = "JqvAskedqvJ", "JqvNextqvJ"


@dataclass(frozen=True, slots=True)
class _Endings:
    """What a template renders after a plain answer.

    ``usual``: what ends the answer, whoever speaks next. ``between``: what ends it if the user speaks next; nothing
    ends the last turn of such a template. Both end with a token of the tokenizer, or are empty. ``trailer``: what is
    rendered at the end of every conversation, such as a generation prompt that nobody asked for.
    """

    usual: str = ""
    between: str = ""
    trailer: str = ""


class TurnBoundaries:
    """Finds where the assistant's turns start and end, with one template."""

    def __init__(self, template: Template) -> None:
        self.template = template
        added = {str(token) for token in template.tokenizer.get_added_vocab()}
        added |= {str(token) for token in template.tokenizer.all_special_tokens}
        # Some tokenizers list runs of spaces or line breaks among them, which end nothing.
        names = sorted((name for name in added if name.strip()), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, names)) or "(?!)")

    @cached_property
    def opened(self) -> str:
        """The tag at the end of the generation prompt (``<think>``), or the empty string."""
        prompt = self._try([{"role": "user", "content": ASKED}], None, prompt=True) or ""
        parts = TAG.split(prompt.rstrip())
        return parts[-2] if len(parts) > 1 and not parts[-1] else ""

    @property
    def open_end(self) -> bool:
        """Whether a turn is ended only if another message follows it."""
        return bool(self._endings.between)

    def find(self, messages: list[Message], tools: Any, number: int, text: str) -> tuple[int, int, bool]:
        """(start, end, whether something ends it) of one turn of the assistant in ``text``."""
        message = messages[number]
        upto = self.template.render(messages[: number + 1], tools)
        (first, last), (alone, alone_last) = self._words(message, number, text), self._words(message, number, upto)
        start = self._start(messages, tools, number, text, upto, first, alone)
        rest = upto[alone_last:].removesuffix(self._endings.trailer)
        if message.get("tool_calls"):
            calls = json.dumps(message["tool_calls"], ensure_ascii=False)
            end, ended = self._calls_end(text[last:], rest, calls)
        else:
            content = said_in(message)
            end, ended = self._end(text[last:], rest, content[len(content.rstrip()) :])
        return start, last + end, ended

    def _words(self, message: Message, number: int, text: str) -> tuple[int, int]:
        """(start, end) of the message's own words in ``text``."""
        found: dict[int, tuple[int, int]] = {}
        called = {int(mark) for mark in MARK.findall(json.dumps(message.get("tool_calls")))}
        for match in MARK.finditer(text):
            mark = int(match[1])
            if mark in numbers(message):
                if mark in found and mark not in called:  # a call's name may come again with its result
                    raise DataError(f"{self.template.name} writes message {number + 1} more than once")
                found.setdefault(mark, match.span())
        content = said_in(message)
        said = MARK.findall(content)
        answer = {int(mark) for mark in MARK.findall(content.rpartition("</think>")[2]) or said}
        if not called <= found.keys():
            raise DataError(f"{self.template.name} does not write the tool calls of message {number + 1}")
        if not called and not (answer and answer <= found.keys()):
            why = "does not write what the assistant says in" if answer else "has nothing to write for"
            raise DataError(f"{self.template.name} {why} message {number + 1}")
        return min(start for start, _ in found.values()), max(end for _, end in found.values())

    # Where a turn starts ----------------------------------------------------------------------------------

    def _start(
        self, messages: list[Message], tools: Any, number: int, text: str, upto: str, first: int, alone: int
    ) -> int:
        """Where the turn starts in ``text``. Its words start at ``first``, and at ``alone`` in ``upto``."""
        before = messages[:number]
        prompt, plain = self._try(before, tools, prompt=True), self._try(before, tools, prompt=False)
        answer = self._try([*before, {"role": "assistant", "content": PROBE}], tools, prompt=False) or ""
        if prompt is not None and plain is not None:
            start = self._prompted(before, tools, text, first, prompt, plain, answer)
            if start is not None:
                return start
        # What the template renders before a plain answer is the heading of any turn.
        header = max(answer.find(PROBE), 0)
        if prompt is not None and answer.startswith(prompt) and not answer[len(prompt) : header].strip():
            header = len(prompt)
        # Before the first word are the heading, and what opens a call.
        lead = upto[header:alone]
        if not (header and upto.startswith(answer[:header]) and text[:first].endswith(lead)):
            raise DataError(f"{self.template.name} does not say where message {number + 1} starts")
        return first - len(lead)

    def _prompted(
        self, before: list[Message], tools: Any, text: str, first: int, prompt: str, plain: str, answer: str
    ) -> int | None:
        """Where in ``text`` the turn continues from ``prompt``, or differs from it; None if that is uncertain.

        Compares only what is between the last words of others and the turn's own, which start at ``first``: earlier,
        the template may render the same messages differently (a thought that it drops later).
        """
        mark = next((match[0] for match in reversed(list(MARK.finditer(text, 0, first)))), "")
        heading, gap = _behind(prompt, mark), _behind(text[:first], mark)
        if heading is None or gap is None:
            return None
        usual = _behind(answer.partition(PROBE)[0], mark) if PROBE in answer else None
        if prompt != plain:
            least = len(heading) - (len(prompt) - len(plain) if prompt.startswith(plain) else 1)
        elif usual is not None and usual.startswith(heading) and not usual[len(heading) :].strip():
            least = len(heading) - 1  # no prompt is needed: a plain answer follows directly
        else:
            # The template always renders a prompt, or never: then the user's turn could continue from there as well.
            other = self._try([*before, {"role": "user", "content": NEXT}], tools, prompt=False)
            next_gap = _behind(other.partition(NEXT)[0], mark) if other else None
            if next_gap is None or next_gap.startswith(heading):
                return None
            least = self._whole(heading, _agreement(heading, next_gap))
        shared = _agreement(heading, gap)
        if shared < len(heading):
            shared = self._whole(heading, shared)
        return first - len(gap) + shared if shared > least else None

    def _whole(self, text: str, end: int) -> int:
        """The last end of a token or of a line in ``text``, at most ``end``."""
        ends = [match.end() for match in self.added.finditer(text) if match.end() <= end]
        return max([*ends, text.rfind("\n", 0, end) + 1])

    # Where a turn ends ------------------------------------------------------------------------------------

    def _end(self, here: str, alone: str, blank: str) -> tuple[int, bool]:
        """How many characters of ``here``, the text after a turn's words, are its end, and whether anything ends it.

        ``alone`` is that text if no turn follows, ``blank`` the white space at the end of the words themselves.
        """
        own = _agreement(blank, here)
        usual, between = self._endings.usual, self._endings.between
        for skip in range(len(here) - len(here.lstrip()) + 1):
            if usual and here.startswith(usual, skip) and alone.startswith(usual, skip):
                return skip + len(usual), True
            if between and here.startswith(between, skip) and not alone.strip():
                return skip + len(between), True
        shared = _agreement(here, alone)
        tokens = [match for match in self.added.finditer(alone) if match.end() <= shared]
        if tokens:
            return tokens[0].end(), True
        if shared == len(alone):
            end = len(alone.rstrip()) or len(alone)
            return max(own, end), end > own
        return own, False

    def _calls_end(self, here: str, alone: str, calls: str) -> tuple[int, bool]:
        """The same for a turn with ``calls`` (as text), whose rest comes first.

        The end is the token that ends a plain answer, otherwise the last token.
        """
        shared = _agreement(here, alone)
        usual = self._last_token(self._endings.usual)
        tokens = [match for match in self.added.finditer(alone) if match.end() <= shared]
        final = [match for match in tokens if match[0] == usual]
        if final and usual not in calls:
            return final[0].end(), True  # some templates render an empty answer after the calls
        if tokens:
            return (final or tokens)[-1].end(), True
        if usual and usual in here and usual in alone and usual not in calls:
            return here.index(usual) + len(usual), True  # some render the last call differently
        if shared == len(alone):
            end = len(alone.rstrip()) or len(alone)
            return end, bool(end)
        raise DataError(f"{self.template.name} does not say where a tool call ends")

    @cached_property
    def _endings(self) -> _Endings:
        """What the template renders after a plain answer, in a sample conversation."""
        talk = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": PROBE}]
        for tools in (None, [TOOL]):
            text = self._try(talk, tools, prompt=False)
            if text is not None and text.count(PROBE) == text.count(ASKED) == 1:
                break
        else:
            return _Endings()
        head, _, alone = text.partition(PROBE)
        then = self._try([*talk, {"role": "user", "content": NEXT}], tools, prompt=False) or ""
        follow = then.partition(PROBE)[2].partition(NEXT)[0]
        usual = alone[: self._last_end(alone, _agreement(alone, follow))]
        between, trailer = "", alone[len(usual) :] if usual else ""
        if not usual and not alone.strip():
            # What opens the user's turn is also before the first one.
            cut = len(follow) - _agreement(follow[::-1], head.partition(ASKED)[0][::-1])
            between = follow[: self._last_end(follow, cut)]
        elif not usual:
            trailer = alone if alone.strip() in head.partition(ASKED)[2] else ""
        return _Endings(usual, between, trailer)

    def _last_end(self, text: str, end: int) -> int:
        """Where the last token in ``text[:end]`` ends; the end-of-text token counts as the last if it is there."""
        tokens = [match for match in self.added.finditer(text) if match.end() <= end]
        final = [match for match in tokens if match[0] == self.template.tokenizer.eos_token]
        return (final or tokens)[-1].end() if tokens else 0

    def _last_token(self, text: str) -> str:
        return next((match[0] for match in reversed(list(self.added.finditer(text)))), "")

    def _try(self, messages: Sequence[Message], tools: Any, *, prompt: bool) -> str | None:
        """The rendering; None if the template refuses this beginning of a conversation."""
        try:
            return self.template.render(messages, tools, prompt=prompt) if messages else None
        except InputError:
            return None


def _behind(text: str, mark: str) -> str | None:
    """What follows the last ``mark`` in ``text``: all of it for an empty mark, None if the mark is missing."""
    place = text.rfind(mark) if mark else 0
    return None if place < 0 else text[place + len(mark) :]


def _agreement(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves: comparing slices is much faster than comparing characters one by one
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
