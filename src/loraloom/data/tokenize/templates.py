"""Which chat template a run uses, and rendering of conversations.

This file knows where templates come from and reports their errors. It does not know which tokens are trained. Templates
come from the tokenizer or the user and are untrusted code: transformers renders them in its sandbox, exactly as at
inference.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.errors import ConfigError, DataError, ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.data.records import Message

#: The file of a chat template, by which transformers finds it with a tokenizer.
TEMPLATE_NAME = "chat_template.jinja"
#: The name of the template for tokenizers without one.
PLAIN = "loraloom-plain"

#: The template ``PLAIN``. It works with any tokenizer, because it needs no special tokens: headings, and the
#: end-of-text token at the end of the assistant's turn. ``plain_template`` fills in BOS and END.
PLAIN_FILE = Path(__file__).with_name("plain.jinja")

#: The end of the assistant's turn in the plain template if the tokenizer has no end-of-text token.
PLAIN_END = "\n### End"


#: A sample tool, for templates that render only conversations with tools.
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}


class Refusal(DataError):
    """The template refuses a conversation; the message is the template's own."""


@dataclass(frozen=True)
class Template:
    """A chat template with its tokenizer. ``name`` gives its origin in messages."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    #: the template; None is the tokenizer's choice (some have a separate one for tools)
    text: str | None
    #: the day that it renders, such as 2026-07-26, if any; None is today
    date: str | None = None

    @property
    def dated(self) -> bool:
        """Whether it can render the date, for which transformers gives templates one function."""
        source = self.text if self.text is not None else getattr(self.tokenizer, "chat_template", None)
        return "strftime_now" in str(source)

    @property
    def plain(self) -> bool:
        """Whether it is the default for tokenizers without a template."""
        return self.name == PLAIN

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False
    ) -> str:
        """The rendering of ``messages``; with ``prompt``, also the generation prompt.

        Raises ``Refusal`` if the template refuses the conversation, ``ModelError`` if it fails, with its own message
        and line, and ``DataError`` for a text that no tokenizer accepts.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        chosen, above = self.text, 0
        if self.date is not None and self.dated:
            chosen, above = _clock(self.date) + self.tokenizer.get_chat_template(self.text, tools), 1
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=chosen,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except TemplateSyntaxError as exc:
            raise ModelError(f"{self.name}, line {exc.lineno - above}: {exc.message}") from None
        except Exception as exc:  # a template can raise whatever Python can
            said = f"{exc}" or type(exc).__name__
            if type(exc) is TemplateError:  # raised only by raise_exception
                raise Refusal(f"{self.name} does not take this conversation: {said}") from None
            raise ModelError(f"{self.name}{_line(exc, above)}: {said}") from None
        assert isinstance(text, str)
        _check_text(text, self.name)
        return text


@cache
def _clock(date: str) -> str:
    """A line to prepend to a template that makes ``strftime_now`` return midnight of ``date``.

    transformers passes templates only its own functions, so this is a macro with the same name, which replaces each
    directive of the format.
    """
    day = datetime.fromisoformat(date)
    codes = [f"%{sign}{code}" for code in "aAwdbBmyYHIMSfjUWVGupcxX" for sign in ("-", "")]
    values = {code: day.strftime(code.replace("-", "")) for code in codes}
    values |= {code: value.lstrip("0") or "0" for code, value in values.items() if "-" in code}
    replaced = "".join(f"|replace({code!r}, {value!r})" for code, value in values.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced}|replace('%%', '%') }}}}{{%- endmacro %}}\n"


def _check_text(text: str, name: str) -> None:
    """What is written may come from anywhere in a row: arguments of calls, schemas of tools, keys of its own."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as exc:
        around = text[max(0, exc.start - 20) : exc.end + 20]
        raise DataError(
            f"half of a surrogate pair, which is no character, in what {name} writes of it: {around!a}; take it "
            "out, or write the whole pair"
        ) from None


def find_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, date: str | None = None
) -> Template:
    """The template that ``chat_template`` selects, otherwise the tokenizer's own, otherwise ``loraloom-plain``.

    ``date`` is the day that it renders, if it renders one. ``chat_template`` is the path of a file (``.jinja``), the
    template itself, or the name of one of the tokenizer's templates. Raises ``ConfigError`` for anything else, and
    ``ModelError`` for a broken template.
    """
    template = replace(_chosen(tokenizer, chat_template), date=date)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    faults = []
    # It may require a system message or tools; if it fails with them as well, it is broken.
    for front, tools in ([], None), ([{"role": "system", "content": "Be kind."}], None), ([], [TOOL]):
        try:
            template.render([*front, *talk], tools)
            return template
        except Refusal:  # it refuses only this conversation
            return template
        except ModelError as exc:
            faults.append(exc)
    raise faults[0]


def _chosen(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> Template:
    own = getattr(tokenizer, "chat_template", None)
    named = own if isinstance(own, dict) else {}
    if chat_template is None:
        if not own:
            return Template(tokenizer, PLAIN, plain_template(tokenizer))
        if named and "default" not in named:
            raise ConfigError(f"chat_template: the tokenizer has {', '.join(sorted(named))}; choose one by its name")
        return Template(tokenizer, "the tokenizer's chat template", None)
    if chat_template in named:
        return Template(tokenizer, f"the tokenizer's chat template {chat_template!r}", named[chat_template])
    if chat_template == PLAIN:
        return Template(tokenizer, PLAIN, plain_template(tokenizer))
    if "{{" in chat_template or "{%" in chat_template:
        return Template(tokenizer, "chat_template", chat_template)
    # Not Path.is_file(): it raises for a name that the system cannot hold.
    if not os.path.isfile(chat_template):
        known = [PLAIN, *named]
        raise ConfigError(
            f"chat_template: {chat_template!r} is neither a file nor a template (there is no {{{{ or {{% in it)"
            f"{nearest(chat_template, known)}"
        )
    try:
        text = Path(chat_template).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"chat_template: {chat_template} cannot be read: {exc}") from None
    if not text.strip():
        raise ConfigError(f"chat_template: {chat_template} is empty")
    return Template(tokenizer, f"chat_template {chat_template}", text)


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """``loraloom-plain`` for this tokenizer, as a template that can be saved beside it.

    It starts with the beginning-of-text token if the tokenizer adds one to a text, as in pretraining; the assistant's
    turns end with the end-of-text token, or with ``### End`` if there is none.
    """
    first = tokenizer("").input_ids[:1]
    bos = tokenizer.bos_token if first and first[0] == tokenizer.bos_token_id else ""
    end = tokenizer.eos_token or PLAIN_END
    return PLAIN_FILE.read_text(encoding="utf-8").rstrip("\n").replace("BOS", _quoted(bos)).replace("END", _quoted(end))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _line(exc: BaseException, above: int) -> str:
    """``, line 7``: the innermost line of the template in an error's traceback.

    ``above``: number of lines prepended to the template.
    """
    line, frame = None, exc.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return f", line {line - above}" if line else ""
