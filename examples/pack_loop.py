"""A training loop on one screen: three adapters of unlike rank learn at once, in one forward and one backward a step.

Usage: ``python examples/pack_loop.py [FOLDER]``. Everything is visible here: batches, optimizers, the loop, the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from loraloom import LoraConfig, Pack, PeftModel

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pack-loop")
name = tiny.model(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(name)

# One frozen model, three slots. alpha = 2r keeps the scale of the update the same for every rank.
ranks = (2, 8, 32)
configs = {
    f"r{r}": LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM") for r in ranks
}
pack = Pack(AutoModelForCausalLM.from_pretrained(name), configs)
optimizers = {name: torch.optim.AdamW(pack.parameters_of(name).values(), lr=5e-3) for name in pack.adapters}

# Labels of -100 take no part in the loss: here those of padding.
batch = dict(tokenizer([row["prompt"] + row["completion"] for row in tiny.rows()], return_tensors="pt", padding=True))
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

for step in range(1, 61):
    losses = pack.backward(dict.fromkeys(pack.adapters, batch))  # its own rows for each, if you like
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:3}  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

pack.model.eval().save_pretrained(folder / "adapters")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), folder / "adapters" / "r32").eval()
prompt = tokenizer("The capital of Japan is ", return_tensors="pt")
written = again.generate(**prompt, max_new_tokens=6, do_sample=False)
print(f"r32 writes: {tokenizer.decode(written[0], skip_special_tokens=True)}")
