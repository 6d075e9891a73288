"""Where one turn of the assistant starts and ends, in the text that a template writes with marks for words.

This file knows how to ask a template: with a prompt and without, up to the turn and beyond it, with another answer
in its place, with another speaker behind it. It does not know how the answers are put together.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loraloom.data.tokenize.placeholders import MARK, TAG, numbers, said_in, shared_tags
from loraloom.data.tokenize.templates import TOOL, Template
from loraloom.errors import DataError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraloom.data.records import Message

#: Words of an assistant's turn that is only there to see what the template writes before and after them.
PROBE = "JqvProbeqvJ"

#: Words of the user before that turn, and after it.
ASKED, NEXT = "JqvAskedqvJ", "JqvNextqvJ"


@dataclass(frozen=True, slots=True)
class _Words:
    """Where a message's own words are in a text: from ``start`` to ``end``, the first ``mark`` of them at ``first``.

    Tags and white space that the words open or close with are in front of the first mark and behind the last.
    """

    start: int
    end: int
    first: int
    mark: int


@dataclass(frozen=True, slots=True)
class _Endings:
    """What a template writes behind a plain answer.

    ``usual``: what closes it, whoever speaks next. ``between``: what closes it where the user speaks next and is
    not written when the conversation ends with it, as some leave the last turn open. Both end with a token of the
    tokenizer; empty where there is none. ``trailer``: what stands behind the end of any conversation, as some
    prompt for a turn that was not asked for.
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
        """The tag that a prompt for the assistant ends with (``<think>``), or the empty string."""
        prompt = self._try([{"role": "user", "content": ASKED}], None, prompt=True) or ""
        parts = TAG.split(prompt.rstrip())
        return parts[-2] if len(parts) > 1 and not parts[-1] else ""

    @property
    def open_end(self) -> bool:
        """Whether a turn is ended only where another message follows it."""
        return bool(self._endings.between)

    def find(self, messages: list[Message], tools: Any, number: int, text: str) -> tuple[int, int, bool]:
        """(start, end, whether something ends it) of one turn of the assistant in ``text``."""
        message = messages[number]
        upto = self.template.render(messages[: number + 1], tools)
        here, alone = self._words(message, number, text), self._words(message, number, upto)
        start = self._start(messages, tools, number, text, upto, here, alone)
        rest = upto[alone.end :].removesuffix(self._endings.trailer)
        if message.get("tool_calls"):
            calls = json.dumps(message["tool_calls"], ensure_ascii=False)
            end, ended = self._calls_end(text[here.end :], rest, calls)
        else:
            content = said_in(message)
            end, ended = self._end(text[here.end :], rest, content[len(content.rstrip()) :])
        return start, here.end + end, ended

    def _words(self, message: Message, number: int, text: str) -> _Words:
        """Where in ``text`` the message's own words are."""
        found: dict[int, tuple[int, int]] = {}
        called = {int(mark) for mark in MARK.findall(json.dumps(message.get("tool_calls")))}
        for match in MARK.finditer(text):
            mark = int(match[1])
            if mark in numbers(message):
                if mark in found and mark not in called:  # a call's name may come again with its result
                    raise DataError(f"{self.template.name} writes {self._name(number)} more than once")
                found.setdefault(mark, match.span())
        content = said_in(message)
        said = [int(mark) for mark in MARK.findall(content)]
        answer = [int(mark) for mark in MARK.findall(content.rpartition("</think>")[2])] or said
        if not called <= found.keys():
            raise DataError(f"{self.template.name} does not write the tool calls of {self._name(number)}")
        if not called and not (answer and set(answer) <= found.keys()):
            why = "does not write what the assistant says in" if answer else "has nothing to write for"
            raise DataError(f"{self.template.name} {why} {self._name(number)}")
        first, first_mark = min((start, mark) for mark, (start, _) in found.items())
        start = first
        end = max(end for _, end in found.values())
        # Tags that the words open or close with are words too.
        for mark, span in found.items():
            if mark in said:
                before, _, after = content.partition(f"Qx{mark}Zqx")
                if span[0] == start:
                    start -= len(shared_tags(text[:start], before, -1).lstrip())
                if span[1] == end:
                    end += len(shared_tags(text[end:], after, 1).rstrip())
        return _Words(start, end, first, first_mark)

    # Where a turn starts ----------------------------------------------------------------------------------

    def _start(
        self, messages: list[Message], tools: Any, number: int, text: str, upto: str, here: _Words, alone: _Words
    ) -> int:
        """Where the turn starts in ``text``: its words are at ``here``, and at ``alone`` in ``upto``."""
        before = messages[:number]
        prompt, plain = self._try(before, tools, prompt=True), self._try(before, tools, prompt=False)
        if prompt is not None and prompt != plain:
            # A tag that the prompt ends with is not the assistant's to write, even where its words have it.
            if text.startswith(prompt) and len(prompt) <= here.first:
                return len(prompt)
            if upto.startswith(prompt) and len(prompt) <= alone.first and alone.mark == here.mark:
                lead = upto[len(prompt) : alone.first]
                if text[: here.first].endswith(lead):
                    return here.first - len(lead)
        elif prompt is not None and upto.startswith(prompt) and not upto[len(prompt) : alone.start].strip():
            # The template has no prompt of its own: the model goes on from the end of the last message.
            lead = upto[len(prompt) : alone.start]
            if text[: here.start].endswith(lead):
                return here.start - len(lead)
        answer = self._try([*before, {"role": "assistant", "content": PROBE}], tools, prompt=False) or ""
        if prompt is not None and plain is not None:
            start = self._prompted(before, tools, text, here.first, prompt, plain, answer)
            if start is not None:
                return start
        # What the template writes in front of a plain answer is the heading of the turn, whatever follows here.
        header = max(answer.find(PROBE), 0)
        if prompt is not None and answer.startswith(prompt) and not answer[len(prompt) : header].strip():
            header = len(prompt)
        if header and text.startswith(answer[:header]) and header <= here.start:
            return header
        told = numbers({**messages[number], "tool_calls": None})
        if any(int(mark[1]) in told for mark in MARK.finditer(text, here.first)):
            return here.start
        # Calls alone: what stands in front of their first name is the heading, and what opens the call.
        lead = upto[header : alone.start]
        if not (header and upto.startswith(answer[:header]) and text[: here.start].endswith(lead)):
            raise DataError(f"{self.template.name} does not say where {self._name(number)} starts")
        return here.start - len(lead)

    def _prompted(
        self, before: list[Message], tools: Any, text: str, first: int, prompt: str, plain: str, answer: str
    ) -> int | None:
        """Where in ``text`` the turn goes on from ``prompt``, or parts from it; None where that is not sure.

        Looks only at what stands between the last words of others and the turn's own, which start at ``first``:
        farther in front, the template may write the same messages differently (a thought that it drops later).
        """
        mark = next((match[0] for match in reversed(list(MARK.finditer(text, 0, first)))), "")
        heading, gap = _behind(prompt, mark), _behind(text[:first], mark)
        if heading is None or gap is None:
            return None
        usual = _behind(answer.partition(PROBE)[0], mark) if PROBE in answer else None
        if prompt != plain:
            least = len(heading) - (len(prompt) - len(plain) if prompt.startswith(plain) else 1)
        elif usual is not None and usual.startswith(heading) and not usual[len(heading) :].strip():
            least = len(heading) - 1  # no prompt is needed: a plain answer stands right there
        else:
            # The template writes a prompt always, or never: then the user's turn could go on from there as well.
            other = self._try([*before, {"role": "user", "content": NEXT}], tools, prompt=False)
            next_gap = _behind(other.partition(NEXT)[0], mark) if other else None
            if next_gap is None or next_gap.startswith(heading):
                return None
            least = self._whole(heading, _agreement(heading, next_gap))
        shared = _agreement(heading, gap)
        if shared < len(heading):
            shared = self._whole(heading, shared)
            if usual is not None and gap.startswith(usual):
                shared = min(shared, len(usual))  # the prompt opens what no plain answer has
        return first - len(gap) + shared if shared > least else None

    def _whole(self, text: str, end: int) -> int:
        """The last place in ``text``, ``end`` at most, that a token of the tokenizer or a line ends at."""
        ends = [match.end() for match in self.added.finditer(text) if match.end() <= end]
        return max([*ends, text.rfind("\n", 0, end) + 1])

    # Where a turn ends ------------------------------------------------------------------------------------

    def _end(self, here: str, alone: str, blank: str) -> tuple[int, bool]:
        """How much of ``here``, the text after a turn's words, is its end, and whether anything ends it.

        ``alone`` is that text with no turn after it, ``blank`` the white space that the words themselves end with.
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
        """The same for a turn with ``calls`` (as text), the rest of which comes first.

        The end is the token that ends a plain answer, or else the last one.
        """
        shared = _agreement(here, alone)
        usual = self._last_token(self._endings.usual)
        tokens = [match for match in self.added.finditer(alone) if match.end() <= shared]
        final = [match for match in tokens if match[0] == usual]
        if final and usual not in calls:
            return final[0].end(), True  # some write an empty answer after the calls
        if tokens:
            return (final or tokens)[-1].end(), True
        if usual and usual in here and usual in alone and usual not in calls:
            return here.index(usual) + len(usual), True  # some write the last call in a way of its own
        if shared == len(alone):
            end = len(alone.rstrip()) or len(alone)
            return end, bool(end)
        raise DataError(f"{self.template.name} does not say where a tool call ends")

    @cached_property
    def _endings(self) -> _Endings:
        """What the template writes behind a plain answer, by a conversation that is only there to see it."""
        talk = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": PROBE}]
        for front, tools in ((), None), (({"role": "system", "content": "Be kind."},), None), ((), [TOOL]):
            text = self._try([*front, *talk], tools, prompt=False)
            if text is not None and text.count(PROBE) == text.count(ASKED) == 1:
                break
        else:
            return _Endings()
        head, _, alone = text.partition(PROBE)
        then = self._try([*front, *talk, {"role": "user", "content": NEXT}], tools, prompt=False)
        if then is None or then.count(PROBE) != 1 or NEXT not in then.partition(PROBE)[2]:
            return _Endings(usual=alone[: self._last_end(alone, len(alone))])
        follow = then.partition(PROBE)[2].partition(NEXT)[0]
        usual = alone[: self._last_end(alone, _agreement(alone, follow))]
        between, trailer = "", alone[len(usual) :] if usual else ""
        if not usual and not alone.strip():
            # What the user's turn opens with is also in front of the first one.
            opening = _agreement(follow[::-1], head.partition(ASKED)[0][::-1])
            cut = len(follow) - opening
            inside = (match.end() for match in self.added.finditer(follow) if match.start() < cut < match.end())
            between = follow[: self._last_end(follow, next(inside, cut))]
        elif not usual:
            trailer = alone if alone.strip() in head.partition(ASKED)[2] else ""
        return _Endings(usual, between, trailer)

    def _last_end(self, text: str, end: int) -> int:
        """Where the last of the tokens in ``text[:end]`` ends; the end-of-text token is the last where it is there."""
        tokens = [match for match in self.added.finditer(text) if match.end() <= end]
        final = [match for match in tokens if match[0] == self.template.tokenizer.eos_token]
        return (final or tokens)[-1].end() if tokens else 0

    def _last_token(self, text: str) -> str:
        return next((match[0] for match in reversed(list(self.added.finditer(text)))), "")

    def _try(self, messages: Sequence[Message], tools: Any, *, prompt: bool) -> str | None:
        """What the template writes, or None where it does not take this beginning of a conversation."""
        try:
            return self.template.render(messages, tools, prompt=prompt) if messages else None
        except InputError:
            return None

    def _name(self, number: int) -> str:
        return f"message {number + 1}"


def _behind(text: str, mark: str) -> str | None:
    """What stands in ``text`` behind the last ``mark``; all of it for the empty one, None where there is none."""
    place = text.rfind(mark) if mark else 0
    return None if place < 0 else text[place + len(mark) :]


def _agreement(one: str, other: str) -> int:
    """How many characters two texts have in common from their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves: comparing slices is much faster than comparing characters one by one
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
