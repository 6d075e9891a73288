"""The names that options have: tasks, what is done with long rows, keys of a source of data."""

from __future__ import annotations

from loraloom.config.lora import TaskType

#: The tasks that a run can train, by their option.
TASKS = {
    "seq-cls": TaskType.SEQ_CLS,
    "causal-lm": TaskType.CAUSAL_LM,
    "token-cls": TaskType.TOKEN_CLS,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "question-answering": TaskType.QUESTION_ANS,
    "feature-extraction": TaskType.FEATURE_EXTRACTION,
}

#: What is done with a row of more than ``max_length`` tokens.
OVERLONG = ("error", "truncate", "drop", "split")

#: Keys of one source of data.
SOURCE_KEYS = ("path", "weight", "name", "split", "revision")
