"""Inside TRL: SFT on prompts and completions, then DPO on pairs, with loraloom's model. Needs ``pip install trl``.

Usage: ``python examples/trl_trainers.py [FOLDER]``. DPO's reference is the same frozen model without the adapter, so
nothing is loaded twice.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny
from loraloom import LoraConfig, get_peft_model

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trl")
name = tiny.model(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(name)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
shared = {"max_steps": 20, "logging_steps": 10, "save_strategy": "no", "report_to": "none", "use_cpu": True,
          "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}  # fmt: skip

sft = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir=str(folder / "sft"), learning_rate=2e-3, **shared),
    train_dataset=Dataset.from_list(tiny.rows()),
    processing_class=tokenizer,
)
sft.train()

cities = list(tiny.CAPITALS.values())
pairs = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{wrong}."}
    for row, wrong in zip(tiny.rows(), [*cities[1:], cities[0]], strict=True)
]
dpo = DPOTrainer(
    model=model,
    args=DPOConfig(output_dir=str(folder / "dpo"), learning_rate=1e-3, **shared),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
)
dpo.train()
model.save_pretrained(folder / "adapter")
margins = [entry["rewards/margins"] for entry in dpo.state.log_history if "rewards/margins" in entry]
print(f"margins {margins[0]:.3f} to {margins[-1]:.3f}, adapter in {folder / 'adapter'}")
