"""What an adapter needs beside its weights to be of use: what its outputs mean, and how its inputs were made.

An adapter's folder in PEFT's format says none of this. Here it is one JSON file beside it, and the chat template.
"""

from __future__ import annotations

import json
from typing import Any

from loraloom.data.tokenize.templates import TEMPLATE_NAME
from loraloom.training.setup import Setup

USAGE_NAME = "usage.json"


def usage(setup: Setup) -> dict[str, Any]:
    """Plain JSON: the task, the model, the limit of tokens, and what the task has of names, problem and template.

    ``id2label`` is as transformers has it in a config: ``AutoModelForSequenceClassification.from_pretrained(base,
    id2label={int(i): name for i, name in id2label.items()})`` builds the model that the adapter belongs to.
    """
    options, data = setup.options, setup.data
    found: dict[str, Any] = {
        "task": options.task,
        "base_model": options.model,
        "revision": options.revision,
        "max_length": options.max_length,
        "overlong": options.overlong,
    }
    found |= setup.task.usage(options, data.problem, setup.base.config)
    if data.names:
        found["id2label"] = {str(number): name for number, name in enumerate(data.names)}
    if data.template is not None:
        found["chat_template"] = TEMPLATE_NAME
    return found


def usage_files(setup: Setup) -> dict[str, bytes]:
    """The files beside an adapter's weights: name → contents."""
    files = {USAGE_NAME: json.dumps(usage(setup), indent=2, ensure_ascii=False).encode() + b"\n"}
    if setup.data.template is not None:
        files[TEMPLATE_NAME] = setup.data.template.encode()
    return files
