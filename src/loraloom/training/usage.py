"""``usage.json`` beside an adapter: what its outputs mean and how its inputs are made; and its chat template.

PEFT's format has no place for either.
"""

from __future__ import annotations

import json
from typing import Any

from loraloom.data.tokenize.templates import TEMPLATE_NAME
from loraloom.training.setup import Setup

USAGE_NAME = "usage.json"


def usage(setup: Setup) -> dict[str, Any]:
    """Plain JSON: the task, the model, the token limit, and the task's labels, problem type and template.

    ``id2label`` is as transformers has it in a config: ``AutoModelForSequenceClassification.from_pretrained(base,
    id2label={int(i): name for i, name in id2label.items()})`` builds the adapter's base model.
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
    """File name → contents."""
    files = {USAGE_NAME: json.dumps(usage(setup), indent=2, ensure_ascii=False).encode() + b"\n"}
    if setup.data.template is not None:
        files[TEMPLATE_NAME] = setup.data.template.encode()
    return files
