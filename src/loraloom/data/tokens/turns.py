"""Where, in the text that a chat template writes, the assistant speaks: by what the template does, not by its name.

This file knows templates from outside only: what they write for a conversation, for its beginnings, and for the
same conversation with other words in it. It does not know tokens' ids or labels.

1. The words of all messages are replaced by marks, and the template writes that. Between the marks stands what
   the template itself adds; it is the same for all conversations of one form, so it is worked out once for each
   form and kept. White space around the words stays where it is, so templates that trim do so here as well.
2. A turn starts where the template stops when it is asked to prompt for it (``add_generation_prompt``), if the
   turn does go on from there; else where its own words start. It ends with the first of the tokenizer's own
   tokens after its words, where that is also written when the conversation ends with this turn.
3. For each row, the marks are filled in again and the outcome must be the text that the template wrote for the
   row itself, to the letter. If it is not (the template treats some words in a way of their own), the same is
   tried with less replaced: tags such as ``</think>`` kept, then only what the assistant says replaced. When that
   fails too, the row is an error: where the assistant speaks is not known, and nothing is guessed.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loraloom.data.tokens.templates import Template
from loraloom.errors import DataError, InputError, ModelError

if TYPE_CHECKING:
    from loraloom.data.records import Chat, Message

#: Plain letters and digits, so that no filter of a template changes it.
MARK = re.compile(r"Qx(\d+)Zqx")

#: Words of an assistant's turn that is only there to see what the template writes before and after them.
PROBE = "JqvProbeqvJ"

#: What a template may look for inside a message: ``<think>``, ``</tool_response>``, ``[/INST]``.
TAG = re.compile(r"(<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\])")

#: The assistant's words other than its content, as models that reason have them.
REASONING = ("reasoning_content", "reasoning", "thinking")

#: Forms of conversation that are remembered.
FORMS = 2048


@dataclass(frozen=True, slots=True)
class Spans:
    """The text of a conversation, and the (start, end) in it of each of the assistant's turns, in characters.

    ``left_out``: the template does not write everything (the reasoning of an earlier turn, a message that it
    ignores). ``endless``: it writes nothing after some turn that would end it.
    """

    text: str
    spans: list[tuple[int, int]]
    left_out: bool
    endless: bool


@dataclass(frozen=True, slots=True)
class _Layout:
    """A form of conversation: what the template writes for it, with marks, and the turns in that text."""

    text: str
    marks: list[tuple[int, int, int]]  # start, end, number of the words that belong there
    spans: list[tuple[int, int]]
    left_out: bool
    endless: bool


class Turns:
    """Finds the assistant's turns in conversations, with one template. Forms that were met are remembered."""

    def __init__(self, template: Template) -> None:
        self.template = template
        added = {str(token) for token in template.tokenizer.get_added_vocab()}
        added |= {str(token) for token in template.tokenizer.all_special_tokens}
        # Some tokenizers list runs of spaces or line breaks among them, which end nothing.
        names = sorted((name for name in added if name.strip()), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._layout = lru_cache(FORMS)(self._find)

    def find(self, chat: Chat) -> Spans:
        """The text of ``chat`` and where the assistant speaks in it.

        Raises ``DataError`` where the template refuses the conversation, or where what it writes cannot be told
        apart with certainty, and ``ModelError`` where the template fails.
        """
        said = chat.messages
        try:
            text = self.template.render(said, chat.tools)
        except ModelError:
            # Some templates can only write the arguments of a call that are JSON text, as OpenAI gives them.
            said = _text_arguments(chat.messages)
            if said == chat.messages:
                raise
            text = self.template.render(said, chat.tools)
        reason = ""
        for level in (0, 1, 2):
            messages, words = _marked(said, level)
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
                own = _numbers(message)
                left_out = left_out or not own <= {mark for *_, mark in places}
                if message.get("role") != "assistant":
                    continue
                start, end, ended = self._turn(messages, tools, number, text)
                spans.append((start, end))
                endless = endless or not ended
                foreign = [mark for begin, _, mark in places if start <= begin < end and mark not in own]
                if foreign or (len(spans) > 1 and start < spans[-2][1]):
                    raise DataError(f"{self._name(number)} cannot be told from the messages around it")
        except InputError as exc:
            return str(exc)
        return _Layout(text, places, spans, left_out, endless)

    def _turn(self, messages: list[Message], tools: Any, number: int, text: str) -> tuple[int, int, bool]:
        """(start, end, whether something ends it) of one turn of the assistant in ``text``."""
        message = messages[number]
        upto = self.template.render(messages[: number + 1], tools)
        here, alone = self._words(message, number, text), self._words(message, number, upto)
        calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
        start = self._start(messages, tools, number, text, upto, here[0], alone[0])
        end, ended = self._end(text[here[1] :], upto[alone[1] :], calls)
        return start, here[1] + end, ended

    def _words(self, message: Message, number: int, text: str) -> tuple[int, int]:
        """Where in ``text`` the first of the message's own words starts, and the last ends."""
        found: dict[int, tuple[int, int]] = {}
        called = {int(mark) for mark in MARK.findall(json.dumps(message.get("tool_calls")))}
        for match in MARK.finditer(text):
            mark = int(match[1])
            if mark in _numbers(message):
                if mark in found and mark not in called:  # a call's name may come again with its result
                    raise DataError(f"{self.template.name} writes {self._name(number)} more than once")
                found.setdefault(mark, match.span())
        content = str(message.get("content") or "")
        said = [int(mark) for mark in MARK.findall(content)]
        answer = [int(mark) for mark in MARK.findall(content.rpartition("</think>")[2])] or said
        if not called <= found.keys():
            raise DataError(f"{self.template.name} does not write the tool calls of {self._name(number)}")
        if not called and not (answer and set(answer) <= found.keys()):
            why = "does not write what the assistant says in" if answer else "has nothing to write for"
            raise DataError(f"{self.template.name} {why} {self._name(number)}")
        start = min(start for start, _ in found.values())
        end = max(end for _, end in found.values())
        # Tags that the words open or close with are words too.
        for mark, span in found.items():
            if mark in said:
                before, _, after = content.partition(f"Qx{mark}Zqx")
                if span[0] == start:
                    start -= len(_shared_tags(text[:start], before, -1).lstrip())
                if span[1] == end:
                    end += len(_shared_tags(text[end:], after, 1).rstrip())
        return start, end

    def _start(
        self, messages: list[Message], tools: Any, number: int, text: str, upto: str, here: int, alone: int
    ) -> int:
        """Where the turn starts in ``text``: its words start at ``here``, and at ``alone`` in ``upto``."""
        before = messages[:number]
        prompt = self._try(before, tools, prompt=True)
        calls_only = not MARK.search(str(messages[number].get("content") or "") + _reasoning(messages[number]))
        if prompt is not None and prompt != self._try(before, tools, prompt=False):
            if text.startswith(prompt) and len(prompt) <= here:
                return len(prompt)
            if upto.startswith(prompt) and len(prompt) <= alone:
                lead = upto[len(prompt) : alone]
                if text[:here].endswith(lead):
                    return here - len(lead)
        elif prompt is not None and upto.startswith(prompt) and not upto[len(prompt) : alone].strip():
            # The template has no prompt of its own: the model goes on from the end of the last message.
            lead = upto[len(prompt) : alone]
            if text[:here].endswith(lead):
                return here - len(lead)
        # What the template writes in front of a plain answer is the heading of the turn, whatever follows here.
        answer = self._try([*before, {"role": "assistant", "content": PROBE}], tools, prompt=False) or ""
        header = max(answer.find(PROBE), 0)
        if prompt is not None and answer.startswith(prompt) and not answer[len(prompt) : header].strip():
            header = len(prompt)
        if header and text.startswith(answer[:header]) and header <= here:
            return header
        if not calls_only:
            return here
        lead = upto[header:alone]
        if not (header and upto.startswith(answer[:header]) and text[:here].endswith(lead)):
            raise DataError(f"{self.template.name} does not say where {self._name(number)} starts")
        return here - len(lead)

    def _end(self, here: str, alone: str, calls: str) -> tuple[int, bool]:
        """How much of ``here``, the text after a turn's words, is its end; ``alone`` is that with no turn after it.

        Where the turn has ``calls`` (as text), the rest of the calls comes first: the end is then the token that
        ends a plain answer, or else the last one.
        """
        shared = _agreement(here, alone)
        tokens = [match for match in self.added.finditer(alone) if match.end() <= shared]
        if tokens and calls:
            usual = self._answers_end
            final = [match for match in tokens if match[0] == usual]
            if final and usual not in calls:
                return final[0].end(), True  # some write an empty answer after the calls
            return (final or tokens)[-1].end(), True
        if tokens:
            return tokens[0].end(), True
        if shared == len(alone):
            end = len(alone.rstrip()) or len(alone)
            return end, bool(end)
        if calls:
            raise DataError(f"{self.template.name} does not say where a tool call ends")
        return 0, False

    @property
    def _answers_end(self) -> str:
        """The token after a plain answer, or the empty string."""
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
        text = self._try(talk, None, prompt=False) or ""
        match = self.added.search(text.partition(PROBE)[2])
        return match[0] if match else ""

    def _try(self, messages: Sequence[Message], tools: Any, *, prompt: bool) -> str | None:
        """What the template writes, or None where it does not take this beginning of a conversation."""
        try:
            return self.template.render(messages, tools, prompt=prompt) if messages else None
        except InputError:
            return None

    def _name(self, number: int) -> str:
        return f"message {number + 1}"


# Marks ----------------------------------------------------------------------------------------------------


def _marked(messages: Sequence[Message], level: int) -> tuple[list[Message], list[str]]:
    """The messages with marks for words, and the words by their marks' numbers.

    Level 0 replaces all; 1 keeps tags; 2 keeps tags, and all that is not the assistant's.
    """
    words: list[str] = []

    def mark(value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = TAG.split(value) if level else [value]
        return "".join(part if TAG.fullmatch(part) and level else one(part) for part in parts)

    def one(part: str) -> str:
        core = part.strip()
        if not core:
            return part
        words.append(core)
        return part.replace(core, f"Qx{len(words) - 1}Zqx", 1)

    marked = []
    for message in messages:
        message = dict(message)
        if message.get("role") == "assistant":
            for key in ("content", *REASONING):
                if key in message:
                    message[key] = mark(message[key])
            if message.get("tool_calls"):
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], "name": mark(call["function"]["name"])}}
                    for call in message["tool_calls"]
                ]
        elif level < 2 and "content" in message:
            message["content"] = mark(message["content"])
        marked.append(message)
    return marked, words


def _text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of calls as JSON text."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _numbers(message: Message) -> set[int]:
    """The marks of a message's words."""
    told = [message.get("content"), *(message.get(key) for key in REASONING), message.get("tool_calls")]
    return {int(mark) for mark in MARK.findall(json.dumps(told))}


def _reasoning(message: Message) -> str:
    return "".join(str(message.get(key) or "") for key in REASONING)


def _filled(layout: _Layout, words: list[str]) -> Spans:
    """The layout with the words in their places."""
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
    """Whether what the template adds to the assistant's turns holds the words of another message."""
    if any(message.get("tool_calls") for message in messages):
        return False  # the arguments of a call are often words of the user, and rightly so
    added = [MARK.sub("\0", layout.text[start:end]) for start, end in layout.spans]
    others = [str(message.get("content") or "").strip() for message in messages if message.get("role") != "assistant"]
    return any(len(other) > 2 and other in part for other in others for part in added)


def _shared_tags(text: str, words: str, step: int) -> str:
    """The tags and white space that stand at the end of both (``step`` -1) or at the start of both (1)."""
    shared = ""
    pieces = [piece for piece in re.split(r"(\s+|<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\])", words) if piece]
    for piece in pieces[::step]:
        longer = shared + piece if step > 0 else piece + shared
        known = piece.isspace() or TAG.fullmatch(piece)
        if not known or not (text.startswith(longer) if step > 0 else text.endswith(longer)):
            break
        shared = longer
    return shared


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
