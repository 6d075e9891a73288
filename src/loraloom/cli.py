"""The command line, thin: parse, call, print. What it does, a library user can do with ``train``, ``lora``, ``report``.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong. Errors are one message on stderr, never a traceback.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import loraloom
from loraloom.config import LoraConfig
from loraloom.errors import ConfigError, InputError, LoraloomError

app = typer.Typer(
    help="Fine-tune LoRA adapters on a frozen model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The options of an adapter, with LoraConfig's names; `train` and `plan` share them.
LORA = "Adapter"
Rank = Annotated[int, typer.Option("--r", help="Rank of the update.", rich_help_panel=LORA)]
Alpha = Annotated[float, typer.Option(help="The update is scaled by alpha / r.", rich_help_panel=LORA)]
Dropout = Annotated[float, typer.Option(help="Dropout before A, in [0, 1).", rich_help_panel=LORA)]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Names with commas between, a regular expression, or all-linear. By default what suits the model type.",
        rich_help_panel=LORA,
    ),
]
Excluded = Annotated[
    str | None, typer.Option(help="Modules never adapted: names or an expression.", rich_help_panel=LORA)
]
Saved = Annotated[str | None, typer.Option(help="Modules trained in full, with commas between.", rich_help_panel=LORA)]
Biases = Annotated[str, typer.Option("--bias", help="Biases to train: none, all, lora_only.", rich_help_panel=LORA)]
RsLora = Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=LORA)]
Start = Annotated[str, typer.Option(help="true, false or gaussian.", rich_help_panel=LORA)]
Patterns = Annotated[str | None, typer.Option(help='JSON: {"name": value}.', rich_help_panel=LORA)]
Layers = Annotated[
    str | None, typer.Option(help="Only these layers: indices with commas between.", rich_help_panel=LORA)
]

Model = Annotated[str, typer.Option(help="Folder or hub name of the pretrained model.")]
Task = Annotated[str, typer.Option(help="seq-cls or causal-lm.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what the frozen model is held in.")]


@app.command()
def train(
    model: Model,
    data: Annotated[str, typer.Option(help="JSONL or CSV with text and label, prompt and completion, or text.")],
    task: Task,
    output: Annotated[str, typer.Option(help="Folder for the adapter, run.json and the plot.")],
    eval_split: Annotated[str, typer.Option(help="Rows to validate on: a share, a count, or a file.")] = "0.1",
    epochs: Annotated[float, typer.Option(help="Times through the data.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Steps in all, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = 16,
    eval_batch_size: Annotated[int, typer.Option(help="Rows at once when validating.")] = 64,
    lr: Annotated[
        float, typer.Option("--lr", "--learning-rate", help="Peak learning rate; about ten times full fine-tuning's.")
    ] = 2e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    eval_steps: Annotated[int | None, typer.Option(help="Validate every so many steps; by default each epoch.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a row; longer ones are cut, and counted.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the split, the order, the start and the dropout.")] = 0,
    dtype: Dtype = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output folder.")] = False,
    r: Rank = 8,
    lora_alpha: Alpha = 8,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = None,
    exclude_modules: Excluded = None,
    modules_to_save: Saved = None,
    bias: Biases = "none",
    use_rslora: RsLora = False,
    init_lora_weights: Start = "true",
    rank_pattern: Patterns = None,
    alpha_pattern: Patterns = None,
    layers_to_transform: Layers = None,
) -> None:
    """Fine-tune a model on your data: the adapter, run.json and a plot go to the output folder."""
    from loraloom.train.options import TrainOptions

    lora = _lora(locals())
    train_run(
        TrainOptions(
            model=model,
            data=data,
            task=task,
            output=output,
            lora=lora,
            eval_split=eval_split,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            learning_rate=lr,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            max_grad_norm=max_grad_norm,
            eval_steps=eval_steps,
            max_length=max_length,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
        )
    )


def train_run(options: Any, console: Console | None = None) -> Any:
    """``loraloom train`` as a function: prepare, train with progress, draw, and say what came out."""
    from loraloom.report.plot import PLOT_NAME, plot_run
    from loraloom.report.terminal import Meter, outcome, overview
    from loraloom.train.run import RUN_NAME, prepare, run

    console = console or Console()
    prepared = prepare(options)
    console.print(overview(prepared))
    with Meter(console, prepared.steps) as meter:
        result = run(prepared, meter)
    plot = Path(options.output) / PLOT_NAME
    plot_run(result.record, plot)
    console.print(outcome(result, options.output, plot, Path(options.output) / RUN_NAME))
    return result


@app.command()
def plan(
    model: Model,
    task: Task,
    batch_size: Annotated[int, typer.Option(help="Rows in a step, for the estimate.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a row, for the estimate.")] = 512,
    labels: Annotated[int, typer.Option(help="Classes of the new head (seq-cls).")] = 2,
    dtype: Dtype = "float32",
    r: Rank = 8,
    lora_alpha: Alpha = 8,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = None,
    exclude_modules: Excluded = None,
    modules_to_save: Saved = None,
    bias: Biases = "none",
    use_rslora: RsLora = False,
    init_lora_weights: Start = "true",
    rank_pattern: Patterns = None,
    alpha_pattern: Patterns = None,
    layers_to_transform: Layers = None,
) -> None:
    """Show what would be adapted and the memory that training needs. Reads the model's config alone."""
    from loraloom.train.load import build_empty
    from loraloom.train.memory import estimate
    from loraloom.train.options import DTYPES, TASKS

    for name, value, known in (("task", task, TASKS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"{name}: must be one of {', '.join(known)}, found {value!r}")
    for name, number in (("batch_size", batch_size), ("max_length", max_length), ("labels", labels)):
        if number < 1:
            raise ConfigError(f"{name}: must be at least 1, found {number}")
    config = _lora(locals()).copy(task_type=TASKS[task])
    made, memory = estimate(
        build_empty(model, TASKS[task], labels), config, rows=batch_size, length=max_length, dtype=dtype
    )
    print(made)
    print(f"memory of a training step with {batch_size} rows of {max_length} tokens in {dtype}:")
    parts = {"frozen model": memory.base, "adapter": memory.adapter, "its gradients": memory.gradients}
    parts |= {"AdamW": memory.optimizer}
    if memory.activations is not None:
        parts["kept for backward"] = memory.activations
    for name, size in parts.items():
        print(f"  {name:18} {_size(size):>10}")
    note = "" if memory.activations is not None else " and what is kept for backward, which cannot be told beforehand"
    print(f"  {'in all':18} {_size(memory.total):>10}{note}")


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="An adapter folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every singular value.")] = False,
) -> None:
    """Show an adapter: its config, size, norms, and the rank that each module really uses."""
    from dataclasses import asdict

    from loraloom.lora.inspection import ENERGY
    from loraloom.lora.inspection import inspect as read

    found = read(folder)
    if as_json:
        print(json.dumps(asdict(found) | {"config": found.config.to_dict()}, indent=2, sort_keys=True))
        return
    config, defaults = found.config.to_dict(), LoraConfig().to_dict()
    console = Console()
    console.print(f"[bold]{escape(folder)}[/]: {found.parameters:,} parameters, {_size(found.bytes)}", highlight=False)
    print(f"base model: {config['base_model_name_or_path']}; dtype {', '.join(found.dtypes)}")
    shown = ("r", "lora_alpha", "lora_dropout", "target_modules")
    more = [key for key in config if config[key] != defaults[key] and key not in (*shown, "base_model_name_or_path")]
    for key in (*shown, *more):
        print(f"  {key}: {config[key]}")
    table = Table("module", box=None, header_style="bold", pad_edge=False)
    for name in ("r", "scale", "norm", "rank used", "largest singular values"):
        table.add_column(name, justify="right")
    for u in found.updates:
        largest = "  ".join(f"{value:.3g}" for value in u.singular_values[:4])
        table.add_row(u.name, str(u.r), f"{u.scale:g}", f"{u.norm:.4g}", str(u.used_rank), largest)
    console.print(table)
    for name, shape in found.others.items():
        print(f"{name}: {'×'.join(map(str, shape))}, in full")
    ranks = sorted(u.used_rank for u in found.updates)
    if ranks:
        print(
            f"rank used = fewest singular directions with {ENERGY:.0%} of the update's squared norm; "
            f"median {ranks[len(ranks) // 2]}, largest {ranks[-1]}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs the command and exits with its code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"loraloom {loraloom.__version__}")
        return 0
    try:
        code = app(arguments, prog_name="loraloom", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LoraloomError as error:
        return _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 1)
    except BrokenPipeError:  # `loraloom plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("out of memory; lower --batch-size or --max-length, or use --dtype bfloat16", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own: an unknown option, a number that is none
            return _fail(error.format_message() or "a command is missing; see loraloom --help", 2)
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _fail("out of memory; lower --batch-size or --max-length, or use --dtype bfloat16", 1)
        if os.environ.get("LORALOOM_TRACEBACK"):
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return _fail(f"unexpected, please report it: {what} (LORALOOM_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return code


def _lora(options: dict[str, Any]) -> LoraConfig:
    """A ``LoraConfig`` from the options that name its fields."""
    return LoraConfig(
        r=options["r"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options["lora_dropout"],
        target_modules=_names(options["target_modules"]),
        exclude_modules=_names(options["exclude_modules"]),
        modules_to_save=options["modules_to_save"].split(",") if options["modules_to_save"] else None,
        bias=options["bias"],
        use_rslora=options["use_rslora"],
        init_lora_weights={"true": True, "false": False}.get(
            options["init_lora_weights"].lower(), options["init_lora_weights"]
        ),
        rank_pattern=_mapping("rank_pattern", options["rank_pattern"]),
        alpha_pattern=_mapping("alpha_pattern", options["alpha_pattern"]),
        layers_to_transform=_indices(options["layers_to_transform"]),
    )


def _names(value: str | None) -> list[str] | str | None:
    """Names with commas between are a list; what holds other signs is a regular expression."""
    if value is None or value.lower() == "all-linear" or not re.fullmatch(r"[\w.,\- ]+", value):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


def _mapping(name: str, value: str | None) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}: not JSON ({error.msg}); write it as '{{\"q_proj\": 16}}', found {value!r}"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: must be a JSON object, found {value!r}")
    return found


def _indices(value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(index) for index in value.split(",")]
    except ValueError:
        raise ConfigError(f"layers_to_transform: must be whole numbers with commas, found {value!r}") from None


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


if __name__ == "__main__":
    main()
