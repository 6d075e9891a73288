"""What loraloom asks of a pretrained model beyond LoRA: its config, its limits, which part of it reads text."""
