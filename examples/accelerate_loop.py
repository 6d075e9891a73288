"""In your own loop with accelerate: one process or several, any device.

Usage: ``python examples/accelerate_loop.py [FOLDER]``, or ``accelerate launch examples/accelerate_loop.py``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import tiny
from loraloom import LoraConfig, get_peft_model

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate-loop")
accelerator = Accelerator(cpu=not torch.cuda.is_available())
with accelerator.main_process_first():
    name = tiny.model(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(name)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
rows = [dict(tokenizer(row["prompt"] + row["completion"])) for row in tiny.rows()]
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _epoch in range(20):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(folder / "adapter")
    print(f"loss {loss.item():.3f}, adapter in {folder / 'adapter'}")
