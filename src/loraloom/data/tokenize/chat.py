"""Conversations to token ids, with the loss on the assistant's tokens only.

This file knows how the assistant's turns become labels, and how a conversation is split. It does not know what any
template renders.

The rendered text is tokenized once as a whole, without further special tokens, as transformers does it at inference.
The loss is on the tokens that the model has to generate: everything after the generation prompt (including an empty
``<think></think>`` if the template renders one), tool calls as rendered, and the token that ends the turn. It is not on
the header of the turn, white space after its end, tool results, or turns of weight 0. ``{% generation %}`` marks are
not used: most templates have none, and others include the header or exclude the end.

Over ``max_length``, with ``split``: a conversation is split between exchanges (a user's message, and everything up to
the next one after an answer). Each part starts with the system message and has as many exchanges as fit; an exchange
that does not fit is an error of that row. Exchanges of weight 0 join others as far as they fit, and never form a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loraloom.data.example import IGNORE, EncodedRow, Settings, fitted, tokenize
from loraloom.data.records import Chat, Message
from loraloom.data.tokenize.assistant_spans import Spans, Turns
from loraloom.data.tokenize.placeholders import silent
from loraloom.data.tokenize.templates import find_template
from loraloom.errors import InputError

#: The word for the trained part, in messages.
WHAT = "what the assistant says"


class ChatEncoder:
    """``Chat`` to token ids and one label per token."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.turns = Turns(find_template(tokenizer, settings.chat_template, settings.date))
        self.notes = _notes(self.turns)

    def encode(self, chats: Sequence[Chat]) -> list[EncodedRow]:
        """One ``EncodedRow`` for each conversation, in order."""
        return self._encode(chats, self.settings)

    def _encode(self, chats: Sequence[Chat], settings: Settings) -> list[EncodedRow]:
        found = [self._find(chat) for chat in chats]
        texts = [spans.text for spans in found if isinstance(spans, Spans)]
        encodings = iter(tokenize(self.tokenizer, texts, add_special_tokens=False))
        return [
            self._labelled(chat, spans, next(encodings), settings) if isinstance(spans, Spans) else spans
            for chat, spans in zip(chats, found, strict=True)
        ]

    def _find(self, chat: Chat) -> Spans | EncodedRow:
        """The assistant's turns that are trained: not those of weight 0. Templates do not see weights."""
        turns = [message for message in chat.messages if message.get("role") == "assistant"]
        if not turns:
            return EncodedRow(problem="the assistant says nothing in the conversation")
        for number, message in enumerate(chat.messages, start=1):
            if silent(message) and message.get("weight", 1):
                name = self.turns.template.name
                return EncodedRow(error=f"{name} has nothing to write for message {number}: it is empty")
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in chat.messages]
        try:
            spans = self.turns.find(Chat(plain, chat.tools))
        except InputError as exc:
            return EncodedRow(error=str(exc))
        weights = [message.get("weight", 1) for message in turns if not silent(message)]
        return replace(spans, spans=[span for span, weight in zip(spans.spans, weights, strict=True) if weight])

    def _labelled(self, chat: Chat, spans: Spans, tokens: Any, settings: Settings) -> EncodedRow:
        ids: list[int] = list(tokens.ids)
        trained, merged = _trained(spans, tokens.offsets)
        if not any(trained):
            return EncodedRow(
                merged=merged,
                problem=f"no token is of {WHAT} alone: the tokenizer knows none of its characters, or joins them to "
                f"what the template writes around them",
            )
        if settings.overlong == "split" and len(ids) > settings.max_length:
            return self._split(chat)
        targets = [token if of else IGNORE for token, of in zip(ids, trained, strict=True)]
        result = fitted(ids, targets, settings, merged=merged, what=WHAT)
        result.left_out = spans.left_out
        return result

    def _split(self, chat: Chat) -> EncodedRow:
        opening, exchanges = _exchanges(chat.messages)
        whole = replace(self.settings, overlong="error")
        total = EncodedRow(overlong=True)
        part: list[list[Message]] = []
        fits: EncodedRow | None = None

        def tried() -> EncodedRow:
            messages = [message for one in [*part, exchange] for message in one]
            return self._encode([Chat([*opening, *messages], chat.tools)], whole)[0]

        for number, exchange in enumerate(exchanges):
            if not any(message.get("role") == "assistant" for message in exchange):
                total.left_out = True  # an unanswered question at the end
                continue
            longer = tried()
            if longer.overlong and fits is not None:
                _add(total, fits)
                part, fits = [], None
                longer = tried()
            while longer.overlong and part:  # these have weight 0
                part = part[1:]
                longer = tried()
            if _untrained(exchange) and fits is None and not longer.error:
                part = [*part, exchange]
                continue
            if longer.overlong:
                beside = " with the system message" if opening else ""
                return EncodedRow(
                    overlong=True,
                    error=f"exchange {number + 1} of the conversation{beside} is longer than max_length="
                    f"{self.settings.max_length} by itself, so the row cannot be split; raise max_length, or "
                    f"shorten it",
                )
            if longer.error or longer.problem:
                return replace(longer, overlong=True, examples=[])
            part, fits = [*part, exchange], longer
        if fits is not None:
            _add(total, fits)
        return total


def _notes(turns: Turns) -> list[str]:
    """Notes about a template: that it is the default, and that it ends no turn."""
    notes, template = [], turns.template
    if template.plain:
        notes.append(
            f"the tokenizer has no chat template: conversations are written as {template.name!r}, with headings such "
            f"as '### Assistant:'; the model must be used with the same one (chat_template: {template.name})"
        )
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        if turns.edges.open_end:
            notes.append(
                f"{template.name} writes nothing after the last of the assistant's turns, so the model learns to end "
                f"only those that another message follows"
            )
        elif turns.find(Chat(talk)).endless:
            notes.append(
                f"{template.name} writes nothing after the assistant's turns, so the model does not learn to end them"
            )
    except InputError:
        pass  # it refuses this conversation, but may accept the rows
    return notes


def _trained(spans: Spans, offsets: Sequence[tuple[int, int]]) -> tuple[list[bool], bool]:
    """For each token whether it is trained, and whether a token was excluded because it spans a boundary."""
    text, trained, merged = spans.text, [], False
    turns = iter([*spans.spans, (len(spans.text) + 1, len(spans.text) + 1)])
    first, last = next(turns)
    done = 0
    for start, end in offsets:
        # Some tokenizers exclude spaces from the offsets of their token; they are then between two tokens.
        if start > done and text[done:start].isspace():
            start = done
        if end > done:
            done = end
        while last <= start:
            first, last = next(turns)
        inside = first <= start and end <= last
        if not inside and end > first:
            outside = text[start : max(start, first)] + text[min(end, last) : end]
            # A space before the first word may be part of its token; a letter of the header may not.
            inside = not outside.strip()
            merged = merged or not inside
        trained.append(inside)
    return trained, merged


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The leading system messages, and the other messages as exchanges."""
    first = next((i for i, m in enumerate(messages) if m.get("role") not in ("system", "developer")), len(messages))
    exchanges: list[list[Message]] = []
    for message in messages[first:]:
        if not exchanges or (message.get("role") == "user" and exchanges[-1][-1].get("role") != "user"):
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:first]), exchanges


def _untrained(exchange: Sequence[Message]) -> bool:
    """All of the assistant's messages in it have weight 0."""
    return not any(message.get("weight", 1) for message in exchange if message.get("role") == "assistant")


def _add(total: EncodedRow, part: EncodedRow) -> None:
    total.examples += part.examples
    total.merged = total.merged or part.merged
    total.left_out = total.left_out or part.left_out
