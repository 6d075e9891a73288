"""What lies in ``files``, by name: adapters and the models they belong to, runs, searches. ``make`` writes it, the
tests read it. Nothing here is internal to loraloom: names of the package, commands, options and keys of run files.
"""

from __future__ import annotations

import contextlib
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
