"""Conversations of many forms to ``Chat``: OpenAI's messages, ShareGPT, Alpaca, prompts of messages.

This file knows roles, tool calls, and errors in conversations. ``records`` defines ``Chat``; the encoder decides which
tokens are trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraloom.data.records import Chat, Message, Pair
from loraloom.data.rows import shown
from loraloom.data.shape.fields import ABSENT, Fields, from_json, text_fault
from loraloom.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")

#: Speakers of ShareGPT → roles.
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


class Fault(Exception):
    """An error in a message; the caller adds the row and the column."""


def read_messages(fields: Fields) -> Chat:
    """OpenAI's form: a list of objects with ``role`` and ``content``, and the ``tools`` that may be called."""
    return _chat(fields, "messages", _messages(fields, "messages", _openai))


def read_sharegpt(fields: Fields) -> Chat:
    """ShareGPT's form: a list of objects with ``from`` and ``value``; ``system`` and ``tools`` beside it."""
    name = "conversations"
    return _chat(fields, name, [*_system(fields), *_messages(fields, name, _sharegpt)])


def read_alpaca(fields: Fields) -> Chat:
    """Alpaca's form: the question is ``instruction``, followed by a blank line and ``input`` if there is one.

    ``history``: a list of earlier [question, answer], which are trained on as well.
    """
    messages = _system(fields)
    if fields.found("history") not in (ABSENT, None, ""):
        for number, turn in enumerate(fields.items("history"), start=1):
            if not (isinstance(turn, list | tuple) and len(turn) == 2):
                raise fields.wrong("history", f"item {number} must be a question and its answer, found {shown(turn)}")
            for role, text in zip(("user", "assistant"), turn, strict=True):
                if fault := text_fault(text):
                    raise fields.wrong("history", f"item {number}: the text {fault}")
                messages.append({"role": role, "content": text})
    asked = fields.text("instruction", empty=True)
    more = fields.text_or_none("input")
    if more is not None:
        asked = f"{asked}\n\n{more}" if asked.strip() else more
    if not asked.strip():
        raise fields.wrong("instruction", "is empty, and there is no input")
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": fields.text("output")})
    return Chat(messages)


def read_prompt_completion(fields: Fields) -> Pair | Chat:
    """Two strings, unchanged, or two lists of messages. Only the completion is trained on."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Pair(fields.text("prompt", empty=True), fields.text("completion"))
    messages: list[Message] = []
    for name, role, read in (("prompt", "user", _prompt_message), ("completion", "assistant", _openai)):
        if isinstance(fields.get(name), list):
            messages += _messages(fields, name, read)
        else:
            messages.append({"role": role, "content": fields.text(name)})
    return _chat(fields, "completion", messages)


def _prompt_message(item: Any) -> Message:
    """A message of a prompt: the assistant's are not trained on."""
    return _openai({**item, "weight": 0} if isinstance(item, dict) and item.get("role") == "assistant" else item)


def _messages(fields: Fields, name: str, read: Callable[[Any], Message]) -> list[Message]:
    """The messages of the column ``name``; ``read`` raises ``Fault`` for one that is wrong."""
    messages = []
    for number, item in enumerate(fields.objects(name), start=1):
        try:
            messages.append(read(item))
        except Fault as fault:
            raise fields.wrong(name, f"item {number}: {fault}") from None
    if not messages:
        raise fields.wrong(name, "is empty: a conversation has at least one message")
    return messages


def _system(fields: Fields) -> list[Message]:
    system = fields.text_or_none("system")
    return [] if system is None else [{"role": "system", "content": system}]


def _chat(fields: Fields, name: str, messages: list[Message]) -> Chat:
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        raise fields.wrong(name, "has no message of the assistant to train on")
    return Chat(messages, _tools(fields))


# OpenAI ---------------------------------------------------------------------------------------------------


def _openai(item: Any) -> Message:
    if not isinstance(item, dict):
        raise Fault(f"an object with 'role' and 'content' is needed, found {shown(item)}")
    if "role" not in item:
        hint = "; this is ShareGPT's form: set format: sharegpt" if "from" in item else nearest("role", item)
        raise Fault(f"no 'role'; there is {', '.join(map(repr, item)) or 'nothing'}{hint}")
    # Null means absent: tables give every message the keys of all.
    message = {key: value for key, value in item.items() if value is not None}
    role = message.get("role")
    calls = message.pop("tool_calls", None)
    if "function_call" in message:  # OpenAI's earlier form of a single call
        calls = [{"type": "function", "function": message.pop("function_call")}, *(calls or [])]
    if role == "function":
        role = message["role"] = "tool"
    if role not in ROLES:
        raise Fault(f"the role {role!r} is not one of {', '.join(ROLES)}{nearest(str(role), ROLES)}")
    if calls and role != "assistant":
        raise Fault(f"only the assistant calls tools, not {role!r}")
    # Only a content that is trained on is required.
    empty = bool(calls) or _weight(message) == 0
    message["content"] = _content(message.get("content"), role, empty)
    if calls:
        message["tool_calls"] = _calls(calls)
    return message


def _weight(message: dict[str, Any]) -> int:
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Fault(f"the weight must be 0 (not trained on) or 1, found {shown(weight)}")
    return int(weight)


def _content(content: Any, role: str, empty: bool) -> str:
    """The content as one string; parts other than text are refused. ``empty``: the content may be empty."""
    if content is None and empty:
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            if not (
                isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, dict) else part
                raise Fault(f"'content' has a part that is no text: {shown(kind)}; only text is read")
            texts.append(part["text"])
        content = "".join(texts)
    if fault := text_fault(content, empty=empty or role != "assistant"):
        raise Fault(f"'content' of {role} {fault}")
    return content  # type: ignore[no-any-return]


def _calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise Fault(f"'tool_calls' must be a list, found {shown(calls)}")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise Fault(f"a tool call needs a 'name' and 'arguments', found {shown(call)}")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        text, arguments = arguments, from_json(arguments) if arguments.strip() else {}
        if arguments is ABSENT:
            raise Fault(f"the arguments of the call of {inner['name']!r} are not JSON: {shown(text)}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise Fault(f"the arguments of the call of {inner['name']!r} must be an object, found {shown(arguments)}")
    made: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if call.get("id") is not None else made


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The functions that may be called; None also for null and an empty list."""
    name = "tools"
    value = fields.found(name)
    if value in (ABSENT, None, "", [], {}):
        return None
    tools = []
    for number, tool in enumerate(fields.objects(name), start=1):
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise fields.wrong(name, f"item {number}: a tool is an object with a 'name', found {shown(tool)}")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools or None


# ShareGPT -------------------------------------------------------------------------------------------------


def _sharegpt(item: Any) -> Message:
    if not isinstance(item, dict):
        raise Fault(f"an object with 'from' and 'value' is needed, found {shown(item)}")
    if "from" not in item or "value" not in item:
        hint = "; this is the form of OpenAI's messages: set format: messages" if "role" in item else ""
        raise Fault(f"'from' and 'value' are needed; there is {', '.join(map(repr, item)) or 'nothing'}{hint}")
    who, value = item["from"], item["value"]
    role = SHAREGPT.get(who) if isinstance(who, str) else None
    if role is None:
        raise Fault(f"'from' is {who!r}, not one of {', '.join(SHAREGPT)}{nearest(str(who), SHAREGPT)}")
    if role == "call":
        if isinstance(value, str) and (text := value) and (value := from_json(text)) is ABSENT:
            raise Fault(f"the 'value' of {who} is not JSON: {shown(text)}")
        calls = _calls(value if isinstance(value, list) else [value])
        if not calls:
            raise Fault(f"the 'value' of {who} calls nothing")
        return {"role": "assistant", "content": "", "tool_calls": calls}
    untrained = _weight(item) == 0
    if fault := text_fault("" if value is None and untrained else value, empty=untrained or role != "assistant"):
        raise Fault(f"the 'value' of {who} {fault}")
    message: Message = {"role": role, "content": value or ""}
    return message if item.get("weight") is None else {**message, "weight": item["weight"]}
