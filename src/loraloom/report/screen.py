"""All output for people passes here, so that no text of a user's or of a file sends commands to the terminal.

``Text`` is rich's, and ``log`` prints plain text; in both, control characters are written visibly (``errors.visible``).
rich by itself drops some of them without a word and lets escape sequences through.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO

import rich.text

from loraloom.errors import visible


class Text(rich.text.Text):
    """Styled text without a control character in it, line breaks and tabs apart."""

    def __init__(self, text: str = "", style: Any = "", **options: Any) -> None:
        super().__init__(visible(text), style, **options)

    def append(self, text: rich.text.Text | str, style: Any = None) -> Text:
        super().append(visible(text) if isinstance(text, str) else text, style)
        return self


def log(text: str, file: TextIO | None = None) -> None:
    """Print ``text`` as it is, never wrapped."""
    print(visible(text), file=file or sys.stdout)
