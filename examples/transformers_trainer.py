"""Inside transformers' Trainer: the model is loraloom's, the rest is as it was.

Usage: ``python examples/transformers_trainer.py [FOLDER]``
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import tiny
from loraloom import LoraConfig, get_peft_model

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/transformers-trainer")
name = tiny.model(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(name)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=40,
        learning_rate=5e-3,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=[dict(tokenizer(row["prompt"] + row["completion"])) for row in tiny.rows()],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained(folder / "adapter")
print(f"loss {trainer.evaluate(trainer.train_dataset)['eval_loss']:.3f}, adapter in {folder / 'adapter'}")
