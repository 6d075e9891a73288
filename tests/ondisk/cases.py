"""What lies in ``files``, by name: adapters and the models they belong to, runs, searches. ``make`` writes it, the
tests read it. Nothing here is internal to loraloom: names of the package, commands, options and keys of run files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FILES = Path(__file__).with_name("files")
WEIGHTS = "adapter_model.safetensors"
#: Ids for every model of language; no id reaches the smallest vocabulary.
IDS = torch.tensor([[1, 5, 9, 3, 7, 2], [4, 8, 6, 10, 2, 2]])


# -- processors -------------------------------------------------------------------------------------------------------


def processor() -> dict[str, Any]:
    """The kind of processor, and what else a number's last bits depend on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = dict(tuple(map(str.strip, line.split(":", 1))) for line in text.splitlines() if ":" in line)  # type: ignore[misc]
    flags = known.get("flags", known.get("Features", "")).split()
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    return {
        "name": known.get("model name", platform.processor() or platform.machine()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": sorted(flag for flag in flags if flag.startswith(("avx", "fma", "amx", "sve"))),
        "limits": {name: os.environ[name] for name in limits if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.system(),
    }


# -- adapters ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions of each kind, and layers that no language model here has."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 4, 3, padding=1)
        self.plane = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.space = nn.Conv3d(4, 3, 2, padding="same")
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        found = self.plane(self.line(x)[..., None].relu())
        found = self.space(found[..., None].tanh()).flatten(2).mean(-1)
        return self.mix(torch.cat([found, self.words(ids).mean(1)], -1))


@dataclass(frozen=True)
class Kind:
    """An adapter: the model, by folder and transformers' class, and the fields of its LoraConfig."""

    model: str
    auto: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def _causal(model: str = "decoder", dtype: torch.dtype = torch.float32, **fields: Any) -> Kind:
    return Kind(model, "AutoModelForCausalLM", {"r": 2, "task_type": "CAUSAL_LM", **fields}, dtype)


def _bert(auto: str = "SequenceClassification", task: str = "SEQ_CLS", **fields: Any) -> Kind:
    fields = {"r": 2, "task_type": task, "target_modules": ["query", "value"], **fields}
    return Kind("encoder", f"AutoModelFor{auto}" if auto else "AutoModel", fields)


def _net(**fields: Any) -> Kind:
    return Kind("net", "", {"r": 2, **fields})


KINDS: dict[str, Kind] = {
    "linear": _causal(),
    "all-linear": _causal(target_modules="all-linear", lora_dropout=0.1),
    "expression": _causal(target_modules=r".*\.layers\.1\..*(q|o)_proj"),
    "excluded": _causal(target_modules="all-linear", exclude_modules=["down_proj"]),
    "rslora": _causal(target_modules=["q_proj", "v_proj"], use_rslora=True, lora_alpha=3),
    "patterns": _causal(
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 3, r"layers\.0\.self_attn\.q_proj": 1},
        alpha_pattern={"q_proj": 5, "up_proj": 0.5},
    ),
    "layers": _causal(target_modules=["k_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "gaussian": _causal(target_modules=["q_proj"], init_lora_weights="gaussian"),
    "random": _causal(target_modules=["q_proj"], init_lora_weights=False),
    "head": _causal(target_modules=["v_proj", "lm_head"]),
    "saved-head": _causal(target_modules=["v_proj"], modules_to_save=["lm_head", "norm"]),
    "only-saved": _causal(target_modules=[], modules_to_save=["input_layernorm"]),
    "bias-all": _bert(bias="all"),
    "bias-lora-only": _bert(bias="lora_only"),
    "classifier": _bert(target_modules=["dense"]),
    "tagger": _bert("TokenClassification", "TOKEN_CLS"),
    "answers": _bert("QuestionAnswering", "QUESTION_ANS"),
    "features": _bert("", "FEATURE_EXTRACTION"),
    "embedding": _bert(target_modules=["word_embeddings", "query"]),
    "saved": _bert(modules_to_save=["LayerNorm", "pooler"]),
    "conv1d": _causal("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "seq2seq": Kind(
        "t5", "AutoModelForSeq2SeqLM", {"r": 2, "task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "wo"]}
    ),
    "experts": _causal("mixtral", target_modules=[], target_parameters=["gate_up_proj", "down_proj"]),
    "experts-too": _causal("mixtral", target_modules=["v_proj"], target_parameters=["experts.down_proj"]),
    "convolutions": _net(target_modules=["line", "plane", "space"], bias="all"),
    "mixed": _net(target_modules=["words", "mix", "line"], modules_to_save=["plane"], alpha_pattern={"mix": 7}),
    "bfloat16": _causal(target_modules=["q_proj", "o_proj"], dtype=torch.bfloat16),
}


def base(kind: Kind, folder: Path = FILES) -> nn.Module:
    """The frozen model of an adapter, as a user loads it."""
    torch.manual_seed(0)  # a new head's numbers; the adapter has its own
    if not kind.auto:
        net = Net()
        net.load_state_dict(load_file(folder / "models" / "net.safetensors"))
        return net.eval()
    import transformers

    found: nn.Module = getattr(transformers, kind.auto).from_pretrained(
        folder / "models" / kind.model, dtype=kind.dtype
    )
    return found.eval()


def outputs(model: nn.Module, grad: bool = False) -> Tensor:
    """What a model answers to the fixed inputs, in float32."""
    with torch.set_grad_enabled(grad):
        if any(isinstance(module, nn.Conv3d) for module in model.modules()):
            x = torch.linspace(-1, 1, 2 * 2 * 6).reshape(2, 2, 6)
            found: Tensor = model(x, IDS % 7)
            return found
        more = {"decoder_input_ids": IDS[:, :3]} if any("decoder" in name for name, _ in model.named_modules()) else {}
        out = model(input_ids=IDS, **more)
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()


# -- runs -------------------------------------------------------------------------------------------------------------

#: A template that writes the date: a run that is resumed on another day keeps that of the first.
DATED = (
    "{{ 'great' if strftime_now('%Y') == '1999' else 'weak' }} {% for m in messages %}{{ m.content }} and {% endfor %}"
)
#: Run files by name, section by section. Of each there is a folder in which it was killed, or came to its end.
RUNS: dict[str, dict[str, Any]] = {}


def _run(name: str, task: str = "seq-cls", **sections: Any) -> None:
    causal = task == "causal-lm"
    found: dict[str, Any] = {
        "task": task,
        "model": {"name": "models/decoder" if causal else "models/encoder"},
        "data": {"train": "chats.jsonl" if causal else "reviews.jsonl", "validation": 8},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"] if causal else ["query", "value"]},
        "train": {"learning_rate": 0.01, "max_steps": 8, "batch_size": 6, "save_steps": 6, "report_to": []},
        "eval": {"steps": 3},
        "output": f"train/{name}",
    }
    for section, keys in sections.items():
        found[section] |= keys
    RUNS[name] = found


_PARTS = {"batch_size": 3, "gradient_accumulation_steps": 4}
_SOON = {"save_steps": 3, "save_total_limit": 1}
_run(
    "checkpoint",  # killed when checkpoint-6 had just come to its name, and had yet to be evaluated
    lora={"lora_dropout": 0.3, "bias": "lora_only"},
    train={"weight_decay": 0.1, "loraplus_lr_ratio": 4.0, "lr_scheduler_type": "cosine", **_SOON, **_PARTS},
)
_run("within", lora={"lora_dropout": 0.3}, train=_PARTS)  # stopped within a step, and killed once that was written down
_run("stopped", "causal-lm", data={"chat_template": DATED}, train=_PARTS)  # ended by SIGTERM within a step
_run(  # killed while it wrote checkpoint-9
    "half-written", "causal-lm", lora={"lora_dropout": 0.1, "use_rslora": True}, train={"max_steps": 10, **_SOON}
)  # fmt: skip
_run("saving")  # killed at its end, before the files of the adapter counted
_run("saved")  # killed at its end, after they did: the first was put in place
_run("float16", model={"dtype": "float16"}, data={"train": "stars.jsonl"}, train=_PARTS)  # its loss scale came down
_run("adamw", train={"optim": "AdamW", "optim_args": {"betas": [0.9, 0.99]}, "loraplus_lr_ratio": 2.0})
_run("nadam", train={"optim": "NAdam"})  # whose state has a number beside tensors of the parameters' shapes
_run(  # the best checkpoint is not the newest, and it ends early
    "best", "causal-lm", train={"learning_rate": 2.0, "max_steps": 12, "save_steps": 2, "save_total_limit": 1},
    eval={"steps": 2, "load_best_model_at_end": True, "early_stopping_patience": 3, "metric_for_best_model": "loss"},
)  # fmt: skip
_run(  # a new head, modules trained in full, embeddings; not by AdamW, which makes much of a bias' gradient that is 0
    "regression", data={"train": "stars.jsonl"},
    lora={"target_modules": ["word_embeddings", "query"], "modules_to_save": ["LayerNorm"], "bias": "all",
          "init_lora_weights": False},
    train={"optim": "SGD", "optim_args": {"momentum": 0.9}, "learning_rate": 0.1},
)  # fmt: skip
#: How near a run's end comes to that on another processor, over the largest number of a tensor. Products in half
#: precision are rounded to one in 2,000.
NEAR = {"float16": 1e-3}


#: Keys of ``lora`` that are PEFT's and that loraloom does not implement, at PEFT's defaults.
_NOT_IMPLEMENTED: dict[str, Any] = {
    **{
        f"{name}_config": None
        for name in ("megatron", "eva", "corda", "lora_ga", "velora", "monteclora", "arrow", "kasa")
    },
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "layer_replication", "use_bdlora")),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"), False),
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "qalora_group_size": 16,
}
#: Run files that came to their end. ``every`` has every key; where one rules another out, that is null, and set in one
#: of the others. ``minimal`` has none that can be left out.
FINISHED: dict[str, dict[str, Any]] = {
    "minimal": {
        "task": "seq-cls",
        "model": {"name": "models/encoder"},
        "data": {"train": "reviews.jsonl"},
        "output": "finished/minimal",
    },
    "every": {
        "task": "seq-cls",
        "output": "finished/every",
        "overwrite": False,
        "model": {"name": "models/encoder", "revision": None, "dtype": "float32", "attn_implementation": "eager",
                  "device": "cpu"},
        "data": {"train": [{"path": "reviews.jsonl", "weight": 2}, {"path": "more.csv", "weight": 1}],
                 "validation": "held-out.csv", "format": "text-label", "columns": {"label": "label"},
                 "max_length": 24, "overlong": "drop", "on_bad_row": "skip", "allow_untrained": True,
                 "chat_template": None, "date": None, "stride": 128,
                 "problem_type": "single_label_classification", "workers": 1},
        "lora": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.25, "target_modules": ["query", "dense"],
                 "target_parameters": None, "exclude_modules": ["pooler.dense", "intermediate.dense"],
                 "bias": "lora_only",
                 "modules_to_save": ["pooler"], "fan_in_fan_out": False, "init_lora_weights": "gaussian",
                 "use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"query": 1.5},
                 "layers_to_transform": [1], "layers_pattern": "layer", "inference_mode": False,
                 "base_model_name_or_path": "models/encoder", "revision": None, "peft_type": "LORA",
                 "peft_version": "0.21.2", "auto_mapping": None, **_NOT_IMPLEMENTED},
        "train": {"epochs": 0.5, "max_steps": None, "batch_size": 5, "gradient_accumulation_steps": 2,
                  "learning_rate": 0.004, "loraplus_lr_ratio": 2.0, "lr_scheduler_type": "warmup_stable_decay",
                  "warmup_ratio": 0.2, "warmup_steps": None, "decay_ratio": 0.3, "optim": "AdamW",
                  "optim_args": {"eps": 1e-6}, "weight_decay": 0.01, "max_grad_norm": 0.7,
                  "gradient_checkpointing": True, "fsdp": False, "seed": 11, "save_strategy": "epoch",
                  "save_steps": None, "save_minutes": None, "save_total_limit": 3, "report_to": ["tensorboard"]},
        "eval": {"strategy": "epoch", "steps": None, "minutes": None, "batch_size": 7,
                 "metrics": ["f1_macro", "accuracy"], "metric_for_best_model": "accuracy",
                 "load_best_model_at_end": True, "early_stopping_patience": 4, "early_stopping_threshold": 0.01,
                 "max_new_tokens": 64},
    },
    "chat": {
        "task": "causal-lm",
        "model": {"name": "models/decoder", "dtype": "bfloat16"},
        "data": {"train": "chats.jsonl", "validation": 0.25, "chat_template": "template.jinja", "date": "2024-07-01",
                 "overlong": "split", "max_length": 12},
        "lora": {"target_modules": "all-linear", "init_lora_weights": False},
        "train": {"max_steps": 3, "warmup_steps": 1, "save_minutes": 60, "report_to": []},
        "eval": {"minutes": 60, "max_new_tokens": 3, "metrics": ["perplexity", "exact_match"]},
        "output": "finished/chat",
    },
    "answers": {
        "task": "question-answering",
        "model": {"name": "models/reader"},
        "data": {"train": "answers.jsonl", "validation": 4, "stride": 3, "max_length": 12},
        "train": {"max_steps": 2, "save_strategy": "no", "lr_scheduler_type": "constant", "report_to": []},
        "eval": {"strategy": "no"},
        "output": "finished/answers",
    },
}  # fmt: skip
#: Model and rows that ``loraloom init`` is asked for a run file of.
STARTERS = {"classify": ("models/encoder", "reviews.jsonl"), "talk": ("models/decoder", "chats.jsonl")}


# -- searches ---------------------------------------------------------------------------------------------------------

#: Run files of searches. ``search`` has every key of the section, and each kind of knob; ``tune/finished`` is its end,
#: and in two more folders it was killed with running, paused and finished trials. ``stopped`` was ended by SIGTERM.
SEARCHES: dict[str, dict[str, Any]] = {
    "search": {
        "task": "causal-lm",
        "model": {"name": "models/decoder"},
        "data": {"train": "chats.jsonl", "validation": 16},
        "train": {"max_steps": 18, "batch_size": 6, "seed": 2},
        "output": "tune/finished",
        "tune": {
            "preset": "quick", "trials": 6, "sampler": "tpe", "reduction": 2, "min_share": 0.2, "finalists": 2,
            "seeds": 1, "metric": "perplexity", "slots": 2, "memory": "8GiB", "workers": 1, "ray_address": None,
            "space": {
                "lora.r": [2, 4],
                "lora.lora_alpha": ["2r", "rslora"],
                "lora.lora_dropout": {"range": [0.0, 0.1], "step": 0.05},
                "lora.target_modules": ["all-linear", "q-v", ["v_proj", "o_proj"]],
                "train.learning_rate": {"log": [0.02, 0.3]},
                "train.gradient_accumulation_steps": [2, 3],
                "train.weight_decay": 0.01,
            },
        },
    },
    "stopped": {
        "task": "seq-cls",
        "model": {"name": "models/encoder"},
        "data": {"train": "reviews.jsonl", "validation": 16},
        "lora": {"bias": "lora_only", "lora_dropout": 0.1},
        "train": {"max_steps": 18, "batch_size": 4, "gradient_accumulation_steps": 3},
        "output": "tune/stopped",
        "tune": {
            "trials": 4, "sampler": "grid", "finalists": 1, "seeds": 0, "slots": 3,
            # A training at the second rate comes to no figure.
            "space": {"lora.r": [2, 3], "train.learning_rate": [0.01, 1.0e+30]},
        },
    },
}  # fmt: skip


# -- the cache --------------------------------------------------------------------------------------------------------

#: The run file whose rows are in ``cache``.
MANY = {
    "task": "seq-cls",
    "model": {"name": "models/encoder"},
    "data": {"train": "many.jsonl", "validation": 8},
    "lora": {"r": 2, "init_lora_weights": False},
    "train": {"max_steps": 2, "batch_size": 8, "optim": "SGD", "learning_rate": 0.1, "report_to": []},
    "output": "aside",
}


def many_rows(path: Path) -> None:
    """More rows than are kept in memory; the same bytes each time."""
    words = [("good", "praise"), ("bad", "blame"), ("fine film", "praise"), ("poor book", "blame")]
    rows = ({"text": text, "label": label} for text, label in itertools.islice(itertools.cycle(words), 5001))
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def near(found: Path, wanted: Path, share: float) -> None:
    """Raise unless the tensors of two files differ by no more than ``share`` of the largest number of each."""
    ours, theirs = load_file(found), load_file(wanted)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(
            ours[key],
            tensor,
            rtol=0,
            atol=share * float(tensor.abs().max()),
            msg=lambda text, key=key: f"{key}: {text}",
        )


# -- commands ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def loraloom(arguments: Sequence[str]) -> int:
    """Run a command in this process, in the folder that is the current one."""
    from loraloom.cli import main

    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
