"""The texts of a conversation replaced by marks, to separate them from what a template adds.

This file knows messages, and which of their parts are texts. It does not know templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraloom.data.records import Message

#: Plain letters and digits, so that no filter of a template changes it.
MARK = re.compile(r"Qx(\d+)Zqx")

#: Tags that a template may parse inside a message: ``<think>``, ``</tool_response>``, ``[/INST]``.
TAG = re.compile(r"(<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\])")

#: Fields with the assistant's reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")


def mark_words(messages: Sequence[Message], level: int) -> tuple[list[Message], list[str]]:
    """The messages with marks for texts, and the texts by the numbers of their marks.

    Level 0 replaces all texts; 1 keeps tags; 2 keeps tags and everything that is not the assistant's.
    """
    words: list[str] = []

    def mark(value: object) -> object:
        if not isinstance(value, str):
            return value
        return "".join(map(one, TAG.split(value))) if level else one(value)

    def one(part: str) -> str:
        core = part.strip()
        if not core or (level and TAG.fullmatch(part)):
            return part
        words.append(core)
        return part.replace(core, f"Qx{len(words) - 1}Zqx", 1)

    marked = []
    for message in messages:
        message = dict(message)
        if message.get("role") == "assistant":
            message |= {key: mark(message[key]) for key in ("content", *REASONING) if key in message}
            if message.get("tool_calls"):
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], "name": mark(call["function"]["name"])}}
                    for call in message["tool_calls"]
                ]
        elif level < 2 and "content" in message:
            message["content"] = mark(message["content"])
        marked.append(message)
    return marked, words


def text_arguments(messages: Sequence[Message]) -> list[Message]:
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


def said_in(message: Message) -> str:
    """The assistant's text in a message; empty for other roles."""
    return str(message.get("content") or "") if message.get("role") == "assistant" else ""


def silent(message: Message) -> bool:
    """Whether it is an empty turn of the assistant, which has no position in the text."""
    words = [message.get("content"), *(message.get(key) for key in REASONING)]
    said = any(isinstance(part, str) and part.strip() for part in words)
    return message.get("role") == "assistant" and not said and not message.get("tool_calls")


def numbers(message: Message) -> set[int]:
    """The marks of a message's texts."""
    told = [message.get("content"), *(message.get(key) for key in REASONING), message.get("tool_calls")]
    return {int(mark) for mark in MARK.findall(json.dumps(told))}
