"""The command line, thin: parse, call, print. What it does, a library user can do with ``train``, ``lora``, ``report``.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong. Errors are one message on stderr, never a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

import loraloom
from loraloom.config.lora import LoraConfig
from loraloom.errors import ConfigError, InputError, LoraloomError, TargetsWarning
from loraloom.report.screen import Text, log

app = typer.Typer(
    help="Fine-tune LoRA adapters on a frozen model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The options of an adapter, with LoraConfig's names; `train` and `plan` share them.
LORA = "Adapter"
Rank = Annotated[int, typer.Option("--lora-r", "--rank", "--r", help="Rank of the update.", rich_help_panel=LORA)]
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
TASK_HELP = "causal-lm, seq-cls, token-cls, seq2seq-lm or question-answering."
Task = Annotated[str, typer.Option(help=TASK_HELP)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what the frozen model is held in.")]

# The options of rows; `train`, `tune` and `data` share them.
DATA, EVAL, KEPT = "Data", "Evaluation", "Checkpoints and trackers"
DataSource = Annotated[
    str | None,
    typer.Option(
        help="JSONL, JSON, CSV, TSV, Parquet or text; a folder or glob of these, a saved or a hub dataset.",
        rich_help_panel=DATA,
    ),
]
Split = Annotated[
    str, typer.Option(help="Rows to validate on: a share, a count, or a source of their own.", rich_help_panel=DATA)
]
Shape = Annotated[
    str | None, typer.Option(help="The shape of the rows, which is otherwise recognised.", rich_help_panel=DATA)
]
Columns = Annotated[
    str | None, typer.Option(help='Our column → yours, in JSON: {"text": "body"}.', rich_help_panel=DATA)
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a row. By default 512, or what the model reads at most.",
        rich_help_panel=DATA,
    ),
]
Overlong = Annotated[
    str, typer.Option(help="Longer rows: truncate, error, drop or split. They are counted.", rich_help_panel=DATA)
]
BadRow = Annotated[
    str, typer.Option(help="stop, or skip: bad rows go to a file with the reasons.", rich_help_panel=DATA)
]
Template = Annotated[
    str | None,
    typer.Option(help="A chat template in place of the tokenizer's: a file, or the text.", rich_help_panel=DATA),
]

#: What ``--resume`` means that names no checkpoint.
NEWEST = "newest"

RunFile = Annotated[
    str | None, typer.Argument(metavar="RUN.yaml", help="A run file. Options given beside it win over it.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the run file, such as lora.r=16. Repeatable."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"loraloom {loraloom.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune LoRA adapters on a frozen model."""


def _check_task(options: Any) -> None:
    """``tasks.check``, loaded once all else is right: it takes torch along."""
    from loraloom import tasks

    tasks.check(options)


@app.command()
def train(
    context: typer.Context,
    run_file: RunFile = None,
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the pretrained model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dtype: Dtype = "float32",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default an accelerator.")] = None,
    data: DataSource = None,
    task: Annotated[str | None, typer.Option(help=TASK_HELP, rich_help_panel=DATA)] = None,
    eval_split: Split = "0.1",
    format: Shape = None,
    columns: Columns = None,
    max_length: Length = None,
    overlong: Overlong = "truncate",
    on_bad_row: BadRow = "stop",
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Leave out rows without a trained token.", rich_help_panel=DATA)
    ] = False,
    chat_template: Template = None,
    date: Annotated[
        str | None, typer.Option(help="The day that a chat template writes; by default today.", rich_help_panel=DATA)
    ] = None,
    stride: Annotated[int, typer.Option(help="Tokens that windows share.", rich_help_panel=DATA)] = 128,
    problem_type: Annotated[
        str | None, typer.Option(help="What a seq-cls label is; by default recognised.", rich_help_panel=DATA)
    ] = None,
    data_workers: Annotated[int | None, typer.Option(help="Processes that tokenise.", rich_help_panel=DATA)] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the adapter, run.json and the plot.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output folder.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[CHECKPOINT]", help="Go on from a checkpoint; by default the newest whole one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but train: check, estimate, say.")] = False,
    epochs: Annotated[float, typer.Option(help="Times through the data.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Steps in all, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward, over all processes.")] = 16,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Forwards whose gradients make a step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Spread the frozen model over the processes of torchrun.")
    ] = False,
    learning_rate: Annotated[
        float, typer.Option("--lr", "--learning-rate", help="Peak learning rate; about ten times full fine-tuning's.")
    ] = 2e-4,
    loraplus_lr_ratio: Annotated[float, typer.Option(help="The rate of B over that of A (LoRA+).")] = 1.0,
    lr_scheduler_type: Annotated[
        str, typer.Option(help="After the warmup: linear, cosine, constant, warmup_stable_decay.")
    ] = "linear",
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps in which it rises, instead of a share.")] = None,
    decay_ratio: Annotated[float, typer.Option(help="Share of the steps in which warmup_stable_decay falls.")] = 0.2,
    optim: Annotated[str, typer.Option(help="adamw, or a class of torch.optim.")] = "adamw",
    optim_args: Annotated[str | None, typer.Option(help='Its arguments, in JSON: {"momentum": 0.9}.')] = None,
    weight_decay: Annotated[float, typer.Option(help="Of the optimizer.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the split, the order, the start and the dropout.")] = 0,
    eval_strategy: Annotated[
        str | None, typer.Option(help="no, steps, epoch or minutes; by default each epoch.", rich_help_panel=EVAL)
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Validate every so many steps.", rich_help_panel=EVAL)] = None,
    eval_minutes: Annotated[float | None, typer.Option(help="... or minutes.", rich_help_panel=EVAL)] = None,
    eval_batch_size: Annotated[int, typer.Option(help="Rows at once when validating.", rich_help_panel=EVAL)] = 64,
    metrics: Annotated[
        str | None, typer.Option(help="Names with commas between, or package.module:function.", rich_help_panel=EVAL)
    ] = None,
    metric_for_best_model: Annotated[
        str | None, typer.Option(help="What is best; by default the first metric.", rich_help_panel=EVAL)
    ] = None,
    load_best_model_at_end: Annotated[
        bool, typer.Option("--load-best-model-at-end", help="End with the best adapter.", rich_help_panel=EVAL)
    ] = False,
    early_stopping_patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations without a better one.", rich_help_panel=EVAL)
    ] = None,
    early_stopping_threshold: Annotated[float, typer.Option(help="Better by this.", rich_help_panel=EVAL)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated for metrics.", rich_help_panel=EVAL)] = 64,
    save_strategy: Annotated[
        str | None, typer.Option(help="no, steps, epoch or minutes; by default each epoch.", rich_help_panel=KEPT)
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Checkpoint every so many steps.", rich_help_panel=KEPT)
    ] = None,
    save_minutes: Annotated[float | None, typer.Option(help="... or minutes.", rich_help_panel=KEPT)] = None,
    save_total_limit: Annotated[int, typer.Option(help="Checkpoints that stay.", rich_help_panel=KEPT)] = 2,
    report_to: Annotated[
        str, typer.Option(help="Trackers with commas between, or none.", rich_help_panel=KEPT)
    ] = "tensorboard",
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
    """Fine-tune a model on your data: the adapter, run.json and a plot go to the output folder.

    Give a run file, or --model, --data, --task and --output.
    """
    from loraloom.config import runfile

    wanted = resume == NEWEST or resume
    found = runfile.read(run_file, settings or (), _given(context), _check_task, resume=wanted)
    for key, place in found.places.items():
        if key.startswith("tune.") and place.startswith("--set"):
            raise ConfigError(f"{place}: does nothing here; it is read by loraloom tune alone")
    from loraloom.report.session import train_run

    train_run(found.options, resume=wanted, dry_run=dry_run, notes=found.notes)


@app.command()
def tune(
    context: typer.Context,
    run_file: RunFile = None,
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the pretrained model.")] = None,
    data: DataSource = None,
    task: Annotated[str | None, typer.Option(help=TASK_HELP, rich_help_panel=DATA)] = None,
    format: Shape = None,
    columns: Columns = None,
    overlong: Overlong = "truncate",
    on_bad_row: BadRow = "stop",
    chat_template: Template = None,
    output: Annotated[str | None, typer.Option(help="Folder of the search; one in it is gone on with.")] = None,
    preset: Annotated[str, typer.Option(help="How far to search: quick, standard, thorough.")] = "standard",
    trials: Annotated[int | None, typer.Option(help="Configurations to try; by default the preset's.")] = None,
    sampler: Annotated[str, typer.Option(help="What proposes them: tpe, random, grid.")] = "tpe",
    metric: Annotated[str | None, typer.Option(help="What to compare by: loss, or the task's own.")] = None,
    slots: Annotated[int | None, typer.Option(help="Trials that train together; by default as many as pay.")] = None,
    memory: Annotated[str | None, typer.Option(help="What may be used, such as 8GiB; by default what is free.")] = None,
    workers: Annotated[int, typer.Option(help="Packs that train at once, each in a process of its own (Ray).")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster for them: host:port, or auto; by default this machine.")
    ] = None,
    eval_split: Split = "0.1",
    epochs: Annotated[float, typer.Option(help="Times through the data, for a trial that goes to its end.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Steps of such a trial, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward of a trial.")] = 16,
    max_length: Length = None,
    seed: Annotated[int, typer.Option(help="Of the split, the order, the start and the proposals.")] = 0,
    dtype: Dtype = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that holds a search.")] = False,
) -> None:
    """Train many configurations at once on one frozen model, and say which to use and why.

    What varies is set by tune.space in the run file, or by --set 'tune.space={lora.r: [8, 16]}'. Killed and run again,
    it goes on where it was.
    """
    from loraloom.report.session import tune_run
    from loraloom.tune.config import TuneConfig

    given = _given(context)
    for name in ("preset", "trials", "sampler", "metric", "slots", "memory", "workers", "ray_address"):
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
            given[f"tune.{name}"] = context.params[name]
    tune_run(TuneConfig.read(run_file, settings or (), given))


@app.command()
def data(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="DATA", help="As --data of train, or a run file (.yaml).")],
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of the model whose eyes it is seen with.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="By default what the rows are for.", rich_help_panel=DATA)] = None,
    eval_split: Split = "0.1",
    format: Shape = None,
    columns: Columns = None,
    max_length: Length = None,
    overlong: Overlong = "truncate",
    on_bad_row: BadRow = "stop",
    chat_template: Template = None,
    rows: Annotated[int, typer.Option(help="Rows that are shown.")] = 3,
) -> None:
    """Show what a model will see: rows with trained tokens in colour, lengths, duplicates, time and memory."""
    from loraloom.config import runfile
    from loraloom.report.session import data_run
    from loraloom.train.init_template import guess

    given = _given(context)
    if source.lower().endswith((".yaml", ".yml")):
        options = runfile.read(source, settings or (), {**given, "output": "-"}, _check_task).options
    else:
        if model is None:
            raise ConfigError("Missing option '--model'.")
        given |= {"data.train": source, "output": "-"}
        given.setdefault(
            "task", task or guess(source, None, format, given.get("data.columns"), on_bad_row == "skip")[0]
        )
        options = runfile.read(None, settings or (), given, _check_task).options
    data_run(options, rows=rows)


@app.command()
def init(
    context: typer.Context,
    model: Model,
    data: Annotated[str, typer.Option(help="What to train on: a file, folder, glob or name.")],
    path: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The file to write.")] = "run.yaml",
    task: Annotated[str | None, typer.Option(help="By default what the rows are for.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run; by default after the file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    eval_split: Split = "0.1",
    format: Shape = None,
    columns: Columns = None,
    max_length: Length = None,
    overlong: Overlong = "truncate",
    on_bad_row: BadRow = "stop",
    chat_template: Template = None,
) -> None:
    """Write a run file for a model and data, with comments on every key."""
    from loraloom.train.init_template import begin

    names = ("eval_split", "format", "columns", "max_length", "overlong", "on_bad_row", "chat_template")
    given = {key.rpartition(".")[2]: value for key, value in _given(context).items()}
    rows = {name: given[shown] for name in names if (shown := {"eval_split": "validation"}.get(name, name)) in given}
    found = begin(model, data, path, task=task, output=output, overwrite=overwrite, **rows)
    log(f"{path}: {found}; next: loraloom train {path} --dry-run")


@app.command()
def plan(
    model: Model,
    task: Task,
    batch_size: Annotated[int, typer.Option(help="Rows in a step, for the estimate.")] = 16,
    max_length: Length = None,
    labels: Annotated[int, typer.Option(help="Classes of the new head (seq-cls).")] = 2,
    dtype: Dtype = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="As with train: layers keep their inputs alone.")
    ] = False,
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
    from loraloom.report.terminal import memory_table
    from loraloom.train.preflight.memory import forecast

    config = _lora(locals())
    made, memory, length = forecast(
        model,
        task,
        config,
        batch_size=batch_size,
        max_length=max_length,
        labels=labels,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    log(str(made))
    log(f"memory of a training step with {batch_size} rows of {length} tokens in {dtype}:")
    log(memory_table(memory))
    if memory.logits:
        log(memory.logits)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="An adapter folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every singular value.")] = False,
) -> None:
    """Show an adapter: its config, size, norms, and the rank that each module really uses."""
    from dataclasses import asdict

    from loraloom.lora.inspection import inspect as read
    from loraloom.report.terminal import inspection

    found = read(folder)
    if as_json:
        fields = asdict(found) | {"config": found.config.to_dict(), "notes": found.config.notes}
        print(json.dumps(fields, indent=2, sort_keys=True))
    else:
        log(inspection(folder, found))


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs the command and exits with its code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TargetsWarning)  # the doctor says it
            code = app(_whole_resume(arguments), prog_name="loraloom", standalone_mode=False)
        if code == 130:  # how the parser says Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except LoraloomError as error:
        if os.environ.get("LORALOOM_TRACEBACK"):
            log(traceback.format_exc(), sys.stderr)
        return _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own: an unknown option, a number that is none
            return _fail(error.format_message() or "a command is missing; see loraloom --help", 2)
        from loraloom.train.failures import explain

        if os.environ.get("LORALOOM_TRACEBACK"):
            log(traceback.format_exc(), sys.stderr)
        if isinstance(error, OSError) and error.filename and error.strerror:
            place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
            return _fail(
                f"{place}: cannot be read or written ({error.strerror}); the same command can be given again", 1
            )
        what = explain(error)
        if what.startswith("out of memory"):
            return _fail(what, 1)
        return _fail(f"unexpected, please report it: {what} (LORALOOM_TRACEBACK=1 shows where)", 1)


def _whole_resume(arguments: list[str]) -> list[str]:
    """``--resume`` may stand alone, which the parser does not know."""
    out = []
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        alone = following.startswith("-") or following.lower().endswith((".yaml", ".yml"))
        out.append(f"--resume={NEWEST}" if argument == "--resume" and alone else argument)
    return out


def _fail(message: str, code: int) -> int:
    Console(stderr=True).print(Text.assemble(Text("error: ", "bold red"), Text(message)), soft_wrap=True)
    return code


def _given(context: typer.Context) -> dict[str, Any]:
    """The options that were given on the command line, by their keys in a run file."""
    from loraloom.config.runfile import KEYS, LORA_KEYS

    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if name in KEYS:
            given[KEYS[name]] = _mapping(name, value) if name in ("columns", "optim_args") and value else value
        elif name in LORA_KEYS:
            given[LORA_KEYS[name]] = _field(name, value)
    return given


def _lora(options: dict[str, Any]) -> LoraConfig:
    """A ``LoraConfig`` from the options that name its fields."""
    return LoraConfig(**{name: _field(name, options[name]) for name in _LORA_OPTIONS})


_LORA_OPTIONS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias"),
    *("use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "layers_to_transform"),
)


def _field(name: str, value: Any) -> Any:
    """What the text of an option means for the field of ``LoraConfig`` with its name."""
    from loraloom.config.lora_checks import split_names

    if value is None:
        return None
    if name in ("target_modules", "exclude_modules"):
        return split_names(name, value)
    if name == "modules_to_save":
        return _list(name, value)
    if name == "init_lora_weights":
        return {"true": True, "false": False}.get(value.lower(), value)
    if name in ("rank_pattern", "alpha_pattern"):
        return _mapping(name, value)
    return _indices(value) if name == "layers_to_transform" else value


def _list(name: str, value: str) -> list[str]:
    names = [part.strip() for part in value.split(",") if part.strip()]
    if not names:
        raise ConfigError(f"{name}: holds no name, found {value!r}; give names with commas between, or leave it out")
    return names


def _mapping(name: str, value: str) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        example = '{"q_proj": 16}' if name.endswith("_pattern") else '{"name": "value"}'
        raise ConfigError(f"{name}: not JSON ({error.msg}); write it as '{example}', found {value!r}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: must be a JSON object, found {value!r}")
    return found


def _indices(value: str) -> list[int]:
    try:
        return [int(index) for index in value.split(",")]
    except ValueError:
        raise ConfigError(f"layers_to_transform: must be whole numbers with commas, found {value!r}") from None


if __name__ == "__main__":
    main()
