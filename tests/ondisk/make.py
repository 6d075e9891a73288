"""Makes ``files``: what loraloom has written to users' disks, as the code beside this file writes it.

    PYTHONPATH=src:tests OMP_NUM_THREADS=1 python -m ondisk.make [models|adapters|train|tune|cache ...]

The files that are committed were made at the commit that ``files/made.json`` names, and stay: they are what a later
loraloom must read, so they are not made again when it writes others. A new format gets files beside them.

Everything is made in an empty folder that is the current one, by relative paths, so that the files can lie anywhere. A
command that is to die is run in a process of its own, which gets SIGKILL when it renames a file (``Death``): what lies
there then is what a user finds. ``files/ends`` holds what the same command comes to that nobody kills.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from safetensors.torch import save_file

from ondisk.cases import (
    DATED,
    FILES,
    FINISHED,
    KINDS,
    MANY,
    RUNS,
    SEARCHES,
    STARTERS,
    WEIGHTS,
    Net,
    base,
    inside,
    loraloom,
    many_rows,
    outputs,
    processor,
)

GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "weak")
OTHERS = ("the", "film", "was", "a", "book", "with", "cat", "in", "it", "and")
#: What the reader of a finished folder has no use for, or what differs from one machine to the next.
LEFT_OUT = ("curves.png", "search.png", "tradeoff.png", "importance.png", "tensorboard")
HOST = "somewhere"


# -- models and rows --------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, template: str, specials: dict[str, str]) -> int:
    """Whole words; returns how many there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials.values(), *GOOD, *BAD, *OTHERS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=specials["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1",
        special_tokens=[(word, words.index(word)) for word in specials.values() if word in template],
    )  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=raw, **specials).save_pretrained(folder)
    return len(words)


def make_models() -> None:
    import transformers

    folder = FILES / "models"
    shutil.rmtree(folder, ignore_errors=True)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    size = _tokenizer(folder / "encoder", "[CLS] $A [SEP]", special)
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = {**tiny, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = {"id2label": {0: "blame", 1: "praise"}, "label2id": {"blame": 0, "praise": 1}}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    made: dict[str, tuple[str, str, dict[str, Any]]] = {
        "encoder": ("BertConfig", "BertForSequenceClassification", {"vocab_size": size, **bert, **names}),
        "reader": ("BertConfig", "BertForQuestionAnswering", {"vocab_size": size, **bert, "num_hidden_layers": 1}),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 24, "n_embd": 8, "n_layer": 2, "n_head": 2,
                 "n_positions": 32, **ends}),
        "t5": ("T5Config", "T5ForConditionalGeneration", {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 16,
               "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"vocab_size": 24, **tiny, "num_key_value_heads": 1,
                    "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 32, **ends}),
    }  # fmt: skip
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    size = _tokenizer(folder / "decoder", "<s> $A", special)
    llama = {**tiny, "vocab_size": size, "num_key_value_heads": 1, "max_position_embeddings": 32, **ends}
    made["decoder"] = ("LlamaConfig", "LlamaForCausalLM", {**llama, "pad_token_id": None})
    for name, (config, model, settings) in made.items():
        torch.manual_seed(0)
        found = getattr(transformers, model)(getattr(transformers, config)(**settings))
        _spread(found)
        found.save_pretrained(folder / name)
    for path in (folder / "encoder").glob("tokenizer*"):
        shutil.copyfile(path, folder / "reader" / path.name)
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "net.safetensors")


def _spread(model: torch.nn.Module) -> None:
    """Numbers large enough that words, and answers, differ; biases and norms too, where mistakes would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.4 if parameter.dim() > 1 else 0.1))


def make_rows() -> None:
    source = random.Random(0)

    def text(word: str) -> str:
        words = [source.choice(OTHERS) for _ in range(source.randint(1, 6))]
        words.insert(source.randrange(len(words) + 1), word)
        return " ".join(words)

    reviews = [{"text": text(source.choice(words)), "label": label}
               for label, words in [("praise", GOOD), ("blame", BAD)] * 24]  # fmt: skip
    stars = [{"text": row["text"], "label": 12.5 if row["label"] == "praise" else -7.5} for row in reviews]
    chats = [{"messages": [{"role": "user", "content": text(word)}, {"role": "assistant", "content": word}]}
             for word in (source.choice(GOOD + BAD) for _ in range(40))]  # fmt: skip
    answers = []
    for _ in range(12):
        words = text("great").split()
        found = {"text": [words[-1]], "answer_start": [len(" ".join(words[:-1])) + (len(words) > 1)]}
        answers.append({"question": "was it", "context": " ".join(words), "answers": found})
    for name, rows in (("reviews", reviews), ("stars", stars), ("chats", chats), ("answers", answers)):
        (FILES / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, part in (("more", reviews[3:11]), ("held-out", reviews[20:28])):
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in part)]
        (FILES / f"{name}.csv").write_text("".join(line + "\n" for line in lines))
    (FILES / "template.jinja").write_text(DATED)


# -- adapters ---------------------------------------------------------------------------------------------------------


def make_adapters() -> None:
    """Each is trained a little as a user's own loop trains it, and saved; ``logits.safetensors`` has its answers."""
    from loraloom import LoraConfig, get_peft_model

    folder, answers = FILES / "adapters", {}
    shutil.rmtree(folder, ignore_errors=True)
    for name, kind in KINDS.items():
        with inside(FILES):
            model = get_peft_model(base(kind, Path()), LoraConfig(**kind.fields), seed=1)
        answers[name] = _trained(model)
        model.save_pretrained(folder / name)
    with inside(FILES):
        model = get_peft_model(base(KINDS["linear"], Path()), LoraConfig(**KINDS["linear"].fields), seed=2)
        answers["first"] = _trained(model)
        model.add_adapter("second", LoraConfig(**KINDS["rslora"].fields), seed=3)
        model.set_adapter("second")
        answers["second"] = _trained(model)
    model.save_pretrained(folder / "two")
    save_file({name: one.contiguous() for name, one in answers.items()}, folder / "logits.safetensors")
    _interrupted(folder)


def _trained(model: torch.nn.Module) -> torch.Tensor:
    before = outputs(model)
    wanted = torch.linspace(-1, 1, before.numel()).reshape(before.shape)
    for step in range(4):
        torch.manual_seed(step)  # dropout
        model.train()
        model.zero_grad()
        (outputs(model, grad=True) - wanted).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.5 * parameter.grad / (parameter.grad.norm() + 1e-3))
    model.eval()
    after = outputs(model)
    assert (after - before).abs().max() > 0.05, "it learnt nothing"
    assert after.isfinite().all()
    return after


def _interrupted(folder: Path) -> None:
    """An adapter that was saved over an older one, killed after the first of its files was put in place."""
    from loraloom import PeftModel

    shutil.copytree(folder / "linear", folder / "interrupted")
    model = PeftModel.from_pretrained(base(KINDS["rslora"]), folder / "rslora")
    Death(rf"interrupted/{WEIGHTS}$").of(lambda: model.save_pretrained(folder / "interrupted"))


# -- what dies --------------------------------------------------------------------------------------------------------


@dataclass
class Death:
    """SIGKILL when a file or folder is renamed to a path that ``onto`` (an expression) finds.

    Args:
        before: it dies before the rename, instead of right after it.
        holds: asked of the path that is renamed, each time; the death is at the first that is right.
        stop: SIGTERM comes first, in the n-th training forward after a rename to what the expression finds.
    """

    onto: str
    before: bool = False
    holds: Callable[[Path], bool] = lambda path: True
    stop: tuple[str, int] | None = None

    def of(self, work: Callable[[], Any]) -> None:
        """Do ``work`` in a fork, which dies; with nothing for ``onto`` it ends with 1, as what is stopped does."""
        code = forked(work, self)
        assert code == (-signal.SIGKILL if self.onto else 1), f"it ended with {code} instead of dying at {self.onto}"

    def install(self) -> None:
        for name in ("rename", "replace"):
            setattr(os, name, self._watched(getattr(os, name)))
        if self.stop:
            torch.nn.modules.module.register_module_forward_pre_hook(self._forward)

    def _watched(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **more: Any) -> None:
            hit = bool(self.onto and re.search(self.onto, str(target))) and self.holds(Path(source))
            if hit and self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target, **more)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.stop and isinstance(self.stop[0], str) and re.search(self.stop[0], str(target)):
                self.stop = ("", self.stop[1])

        return rename

    def _forward(self, module: torch.nn.Module, args: Any) -> None:
        if (
            self.stop
            and not self.stop[0]
            and torch.is_grad_enabled()
            and type(module).__name__ in ("BertModel", "LlamaModel")
        ):
            self.stop = ("", self.stop[1] - 1)
            if not self.stop[1]:
                signal.raise_signal(signal.SIGTERM)


def forked(work: Callable[[], Any], death: Death | None = None) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            socket.gethostname = lambda: HOST
            if death:
                death.install()
            code = int(work() or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- runs -------------------------------------------------------------------------------------------------------------

#: Run → how it dies; those that are missing come to their end.
DEATHS = {
    "checkpoint": Death(r"/checkpoint-6$"),
    "within": Death(r"/checkpoint-7$", stop=(r"/checkpoint-6$", 4 + 3)),
    "stopped": Death("", stop=(r"/checkpoint-6$", 4 + 2)),
    "half-written": Death(r"/\.checkpoint-9\.\w+/manifest.json$", before=True),
    "saving": Death(r"/\.loraloom-commit.json$", before=True, holds=lambda path: b"run.json" in path.read_bytes()),
    "saved": Death(rf"saved/{WEIGHTS}$"),
    "best": Death(r"/checkpoint-8$"),
    **{name: Death(r"/checkpoint-6$") for name in ("float16", "adamw", "nadam", "regression")},
}


def make_train() -> None:
    """``train/NAME.yaml``, what it left in ``train/NAME``, and the end of it in ``ends/NAME.safetensors``."""
    shutil.rmtree(FILES / "train", ignore_errors=True)
    for name, settings in RUNS.items():
        _write(f"train/{name}.yaml", settings)
        _killed(["train", f"train/{name}.yaml"], f"train/{name}", DEATHS[name], ["--resume"], [WEIGHTS])


def _killed(command: list[str], output: str, death: Death, again: list[str], compared: list[str]) -> None:
    """The folder ``output`` as ``death`` leaves it, and in ``ends`` what is ``compared`` of a run that nobody kills.

    What is kept is what loraloom itself comes to the same from.
    """
    with inside(FILES), tempfile.TemporaryDirectory(dir=".") as aside:
        whole, resumed = (str(Path(aside, name)) for name in ("whole", "resumed"))
        assert forked(partial(loraloom, [*command, "--output", whole])) == 0
        death.of(partial(loraloom, command))
        _tidy(Path(output))
        shutil.copytree(output, resumed)
        assert forked(partial(loraloom, [*command, "--output", resumed, *again])) == 0
        for file in compared:
            assert Path(whole, file).read_bytes() == Path(resumed, file).read_bytes(), file
            shutil.copyfile(Path(whole, file), f"ends/{Path(output).name}{Path(file).suffix}")


def make_finished() -> None:
    """``finished/NAME.yaml`` and its folder, and run files that ``loraloom init`` writes, with what comes of them."""
    for folder in ("finished", "starters"):
        shutil.rmtree(FILES / folder, ignore_errors=True)
    with inside(FILES):
        for name, settings in FINISHED.items():
            _write(f"finished/{name}.yaml", settings)
            assert forked(partial(loraloom, ["train", f"finished/{name}.yaml"])) == 0
            _tidy(Path("finished", name))
        for name, (model, data) in STARTERS.items():
            file = f"starters/{name}.yaml"
            assert forked(partial(loraloom, ["init", file, "--model", model, "--data", data])) == 0
            assert forked(partial(loraloom, ["train", file, "--max-steps", "1", "--output", "aside"])) == 0
            shutil.copyfile("aside/run.yaml", f"starters/{name}.run.yaml")
            shutil.rmtree("aside")


# -- the cache --------------------------------------------------------------------------------------------------------


def make_cache() -> None:
    """``cache``: what a run over rows that are many, as loraloom counts, has left there; and what the run came to."""
    shutil.rmtree(FILES / "cache", ignore_errors=True)
    with inside(FILES):
        os.environ["LORALOOM_CACHE"] = "cache"
        many_rows(Path("many.jsonl"))
        _write("many.yaml", MANY)
        assert forked(partial(loraloom, ["train", "many.yaml"])) == 0
        shutil.copyfile(f"aside/{WEIGHTS}", "ends/cache.safetensors")
        shutil.copyfile("aside/run.json", "ends/cache.json")
        shutil.rmtree("aside")
        Path("many.jsonl").unlink()


# -- searches ---------------------------------------------------------------------------------------------------------


def _in_the_midst(path: Path, late: bool = False) -> bool:
    """Does this ``search.json`` have trials that run, that wait at a rung, and that came to their end?

    ``late``: all there are have begun, so that the last ones are repeats of the best.
    """
    trials = json.loads(path.read_bytes())["trials"] if path.exists() else []
    begun = [trial for trial in trials if trial["step"]]
    there = {"running", "waiting", "finished"} <= {trial["state"] for trial in begun}
    return there and (not late or (begun == trials and trials[-1]["repeats"] is not None))


def make_tune() -> None:
    """``tune/NAME.yaml`` and what it left."""
    shutil.rmtree(FILES / "tune", ignore_errors=True)
    for name, settings in SEARCHES.items():
        _write(f"tune/{name}.yaml", settings)
    with inside(FILES):
        assert forked(partial(loraloom, ["tune", "tune/search.yaml"])) == 0
        _tidy(Path("tune/finished"))
        onto, command = r"/search\.json$", ["tune", "tune/search.yaml", "--output"]
        saving, there = (
            r"/\.loraloom-commit\.json$",
            lambda path: _in_the_midst(path.with_name("search.json"), late=True),
        )
        Death(saving, before=True, holds=there).of(partial(loraloom, [*command, "tune/killed"]))
        Death(onto, before=True, holds=_in_the_midst).of(partial(loraloom, [*command, "tune/interrupted"]))
        Death("", stop=(onto, 3 * 15 + 2)).of(partial(loraloom, ["tune", "tune/stopped.yaml"]))
        assert forked(partial(loraloom, ["tune", "tune/stopped.yaml", "--output", "ends/stopped"])) == 0
        _tidy(Path("ends/stopped"))


def _write(name: str, settings: dict[str, Any]) -> None:
    path = FILES / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False, width=100))


def _tidy(folder: Path) -> None:
    for name in LEFT_OUT:
        for path in folder.rglob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_note() -> None:
    """Which loraloom wrote the files, and where."""
    import loraloom as package

    git = ["git", "-C", str(Path(package.__file__).parent), "rev-parse", "HEAD"]
    commit = os.environ.get("COMMIT") or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    note = {"commit": commit, "loraloom": package.__version__, "processor": processor()}
    (FILES / "made.json").write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    (FILES / "ends").mkdir(parents=True, exist_ok=True)
    for part in sys.argv[1:] or ["models", "rows", "adapters", "train", "finished", "tune", "cache"]:
        globals()[f"make_{part}"]()
    make_note()
