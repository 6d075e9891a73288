"""The assistant's spans in the text that a chat template renders, found by rendering, not by the template's name.

This file treats a template as a black box: it renders conversations, their beginnings, and the same conversation with
other texts. It does not know token ids or labels.

1. The texts of all messages are replaced by marks, and the result is rendered. Between the marks is what the template
   adds; it is the same for all conversations of one form, so it is computed once per form and cached. White space
   around the texts is kept, so that templates that trim do so here as well.
2. A turn starts where the template's generation prompt (``add_generation_prompt``) ends, if the turn continues from
   there, or where the two differ (a prompt may open a thought that the turn does not have); otherwise where its own
   text starts. It ends with the tokens that close a plain answer for any next speaker; otherwise with the first token
   that is also rendered if the conversation ends with this turn.
3. For each row the marks are filled in again, and the result must equal the rendering of the row itself exactly. If it
   does not (the template treats some texts specially), fewer texts are replaced: first tags such as ``</think>`` are
   kept, then only the assistant's texts are replaced. If that fails too, the row is an error; nothing is guessed.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from loraloom.data.tokenize.placeholders import MARK, mark_words, numbers, said_in, silent, text_arguments
from loraloom.data.tokenize.templates import Template
from loraloom.data.tokenize.turn_boundaries import TurnBoundaries
from loraloom.errors import DataError, InputError, ModelError

if TYPE_CHECKING:
    from loraloom.data.records import Chat, Message

#: Maximum number of cached forms.
FORMS = 2048


@dataclass(frozen=True, slots=True)
class Spans:
    """The text of a conversation, and the (start, end) of each of the assistant's turns that is not empty.

    ``left_out``: the template omits something (the reasoning of an earlier turn, a message that it ignores).
    ``endless``: it renders no end of some turn.
    """

    text: str
    spans: list[tuple[int, int]]
    left_out: bool
    endless: bool


@dataclass(frozen=True, slots=True)
class _Layout:
    """A form of conversation: its rendering with marks, and the turns in it."""

    text: str
    marks: list[tuple[int, int, int]]  # start, end, number of the text that belongs there
    spans: list[tuple[int, int]]
    left_out: bool
    endless: bool


class Turns:
    """Finds the assistant's turns in conversations with one template. Forms are cached."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.edges = TurnBoundaries(template)
        self._layout = lru_cache(FORMS)(self._find)

    def find(self, chat: Chat) -> Spans:
        """The text of ``chat`` and the assistant's spans in it.

        Raises ``DataError`` if the template refuses the conversation or the spans cannot be determined, and
        ``ModelError`` if the template fails.
        """
        said = chat.messages
        try:
            text = self.template.render(said, chat.tools)
        except ModelError:
            # Some templates accept the arguments of a call only as JSON text, as in OpenAI's API.
            said = text_arguments(chat.messages)
            if said == chat.messages:
                raise
            text = self.template.render(said, chat.tools)
        reason = ""
        # A tag at the start of a text may already be in the prompt.
        opened = self.edges.opened
        tags = bool(opened) and any(said_in(message).lstrip().startswith(opened) for message in said)
        for level in (1, 0, 2) if tags else (0, 1, 2):
            messages, words = mark_words(said, level)
            form = json.dumps([messages, chat.tools, level], ensure_ascii=False, default=str)
            found = self._layout(form)
            if isinstance(found, str):
                reason = found
                continue
            if level == 2 and _quotes(found, said):
                reason = f"{self.template.name} writes words of others into the assistant's turn"
                continue
            filled = _filled(found, words)
            if filled.text == text:
                return filled
            reason = f"{self.template.name} does not write the words of this conversation as they are"
        raise DataError(f"{reason}, so what to train on cannot be told with certainty")

    # One form ---------------------------------------------------------------------------------------------

    def _find(self, form: str) -> _Layout | str:
        """The layout of a form, or why there is none."""
        messages, tools, _ = json.loads(form)
        try:
            text = self.template.render(messages, tools)
            places = [(match.start(), match.end(), int(match[1])) for match in MARK.finditer(text)]
            spans, left_out, endless = [], False, False
            for number, message in enumerate(messages):
                own = numbers(message)
                left_out = left_out or not own <= {mark for *_, mark in places}
                if message.get("role") != "assistant" or silent(message):
                    continue
                start, end, ended = self.edges.find(messages, tools, number, text)
                spans.append((start, end))
                endless = endless or not ended
                foreign = [mark for begin, _, mark in places if start <= begin < end and mark not in own]
                if foreign or (len(spans) > 1 and start < spans[-2][1]):
                    raise DataError(f"message {number + 1} cannot be told from the messages around it")
        except InputError as exc:
            return str(exc)
        return _Layout(text, places, spans, left_out, endless)


def _filled(layout: _Layout, words: list[str]) -> Spans:
    """The layout with the texts filled in."""
    pieces, done, ends, shifts, shift = [], 0, [], [0], 0
    for start, end, mark in layout.marks:
        word = words[mark] if mark < len(words) else layout.text[start:end]
        pieces += [layout.text[done:start], word]
        done = end
        shift += len(word) - (end - start)
        ends.append(end)
        shifts.append(shift)
    text = "".join([*pieces, layout.text[done:]])

    def moved(place: int) -> int:
        return place + shifts[bisect_right(ends, place)]

    spans = [(moved(start), moved(end)) for start, end in layout.spans]
    return Spans(text, spans, layout.left_out, layout.endless)


def _quotes(layout: _Layout, messages: Sequence[Message]) -> bool:
    """Whether the template's additions to the assistant's turns contain the text of another message."""
    if any(message.get("tool_calls") for message in messages):
        return False  # the arguments of a call often repeat words of the user, which is valid
    added = [MARK.sub("\0", layout.text[start:end]) for start, end in layout.spans]
    others = [str(message.get("content") or "").strip() for message in messages if message.get("role") != "assistant"]
    return any(len(other) > 2 and other in part for other in others for part in added)
