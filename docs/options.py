"""Write the tables of options into the pages, from the fields of the config classes.

Usage: ``python docs/options.py``. The text between ``<!-- options: GROUP -->`` and ``<!-- /options -->`` is replaced.
``CHINESE`` is keyed by the English sentence: whoever changes a help text changes its translation.
"""

from __future__ import annotations

import re
from pathlib import Path

from loraloom.config.keys import OPTIONS
from loraloom.config.options import GROUPS, NEEDED, Option

ROOT = Path(__file__).parents[1]
PAGES = ("docs/train.md", "docs/tune.md", "docs/zh/train.md", "docs/zh/tune.md")
#: The group of a marker that stands for a sentence: the options that ``tune`` has in common with ``train``.
SHARED = "shared"
HEADS = {"en": ("option", "key", "default", "meaning"), "zh": ("选项", "键", "默认值", "含义")}
BLOCK = re.compile(r"(<!-- options: ([\w ]+) -->\n).*?(<!-- /options -->)", re.DOTALL)

CHINESE = {
    # Run
    "Model folder, or name on the hub": "模型目录，或者 Hub 上的名字",
    "Training data: file, folder, glob, or name of a dataset": "训练数据：文件、目录、通配符或数据集的名字",
    "What to train for": "训练什么任务",
    "Folder for the adapter, the records and the plots": "存放适配器、记录和图片的目录",
    "Replace the adapter and checkpoints in that folder": "替换该目录里的适配器和检查点",
    # Search
    "How far to search": "搜索到什么程度",
    "What varies: keys such as lora.r, each with a list or a range": "搜索空间：lora.r 之类的键，各带一个列表或范围",
    "Configurations to try": "尝试多少组配置",
    "What proposes configurations": "由谁提出配置",
    "At each rung, one trial in N continues": "在每一级上，每 N 个 trial 里有一个晋级",
    "First rung, as a share of the steps; 1 trains all to the end": (
        "第一级所在的步数比例；1 表示每个 trial 都完整训练"
    ),
    "What undecided trials may cost, over training all to the end": "未分胜负的 trial 最多花多少，相对于全部完整训练",
    "Best configurations to train again with other seeds": "多少组最好的配置换种子重新训练",
    "Other seeds for each finalist; 0 for none": "每组换几个种子；0 表示不换",
    "Metric to compare by": "用哪个指标比较",
    "What to want beside quality, among those as good": "质量之外更看重什么，在同样好的配置里选",
    "Take the smallest at most this far from the best": "与最好的相差不超过这个数的，取最小的一个",
    "Largest adapter to recommend, such as 5MiB": "推荐的适配器最大多大，例如 5MiB",
    "Search although held-out rows are among the training rows": "留出的行与训练行重复时也照样搜索",
    "Most configurations, extensions included": "最多多少组配置，追加的也算在内",
    "Time limit, such as 2h or 90m": "时间上限，例如 2h 或 90m",
    "Trials to train together": "多少个 trial 一起训练",
    "Memory limit, such as 8GiB": "内存上限，例如 8GiB",
    "Packs to train at once, each in its own process (Ray)": "同时训练的 pack 数，每个在自己的进程里（Ray）",
    "Ray cluster: host:port, or auto": "Ray 集群：host:port 或 auto",
    # Model
    "Branch, tag or commit of the model on the hub": "模型在 Hub 上的分支、标签或提交",
    "Data type of the frozen model; the adapter is in float32": "冻结模型的数据类型；适配器用 float32",
    "Attention: sdpa, eager, flash_attention_2, ...": "注意力的实现：sdpa、eager、flash_attention_2……",
    "cpu, cuda, cuda:1, mps": "cpu、cuda、cuda:1、mps",
    # Data
    "Held-out rows: a share, a count, or data of their own": "留出的验证行：比例、行数，或者单独的数据",
    "Rows kept for a last test, in the same ways": "留给最后测试的行，给法相同",
    "Shape of the rows, such as text-label": "数据格式，例如 text-label",
    'Names of columns, ours to yours, such as {"text": "body"}': '列名，从 loraloom 的到你的，例如 {"text": "body"}',
    "Longest row, in tokens": "一行最长多少 token",
    "What to do with longer rows": "怎样处理更长的行",
    "What to do at a bad row; skip lists them in bad-rows.jsonl": (
        "遇到有问题的行怎么办；skip 把它们记入 bad-rows.jsonl"
    ),
    "Leave out rows that have no token to train on": "跳过没有任何 token 参与训练的行",
    "Chat template: a file, or the text": "对话模板：文件，或者模板的文本",
    "Date that a chat template writes": "对话模板写出的日期",
    "Tokens that windows of a long context share (question-answering)": (
        "长上下文的相邻窗口重叠多少 token（question-answering）"
    ),
    "Kind of label (seq-cls)": "标签的种类（seq-cls）",
    "Processes that tokenize": "分词的进程数",
    # Adapter
    "Rank of the update": "更新的秩",
    "The update is scaled by alpha / r": "更新乘以 alpha / r",
    "Dropout on the adapter's input while training": "训练时适配器输入上的 dropout",
    "Modules to adapt: names, a regular expression for whole names, or all-linear": (
        "适配哪些模块：名字、匹配完整名字的正则表达式，或者 all-linear"
    ),
    "Parameters to adapt that no layer calls, such as stacked weights of experts": (
        "适配哪些不由层调用的参数，例如堆叠的专家权重"
    ),
    "Modules that are never adapted: names or a regular expression": "绝不适配的模块：名字或正则表达式",
    "Biases of the base that the adapter trains a copy of": "适配器训练基座的哪些偏置的副本",
    "Modules trained in full and saved with the adapter": "完整训练、随适配器保存的模块",
    "Start of A: true (Kaiming) or gaussian, B is zero; false: both random": (
        "A 的初始值：true（Kaiming）或 gaussian，B 为零；false：两者都随机"
    ),
    "Scale the update by alpha / sqrt(r), which keeps high ranks learning": (
        "更新乘以 alpha / sqrt(r)，让高秩也能学习"
    ),
    "Ranks by name or regular expression; the first match counts": ("按名字或正则表达式给模块设秩；以第一个匹配为准"),
    "lora_alpha by name or regular expression": "按名字或正则表达式设 lora_alpha",
    "Adapt these layers alone, by index; needs target_modules as names": (
        "只适配这些层，按序号；target_modules 必须是名字"
    ),
    "Name of the list of layers in which layers_to_transform counts": "layers_to_transform 在哪个层列表里计数",
    # Training
    "Passes over the training rows; may be a fraction": "训练数据过几遍；可以是小数",
    "Total number of steps, instead of epochs": "总步数，代替 epoch",
    "Rows of one forward, over all processes": "一次前向的行数，所有进程合计",
    "Forwards whose gradients make one step": "多少次前向的梯度合成一步",
    "Peak learning rate; about ten times that of full fine-tuning": "最高学习率；大约是全量微调的十倍",
    "Learning rate of B divided by that of A (LoRA+)": "B 的学习率除以 A 的学习率（LoRA+）",
    "Learning rate schedule after the warmup": "预热之后的学习率调度",
    "Warmup, as a share of the steps": "预热占总步数的比例",
    "Warmup, in steps instead of a share": "预热的步数，代替比例",
    "Share of the steps in which warmup_stable_decay falls": "warmup_stable_decay 下降阶段占总步数的比例",
    "Your own loss, my_module:my_function of (outputs, batch)": (
        "自定义损失，my_module:my_function，参数是 (outputs, batch)"
    ),
    "Optimizer: adamw, or a class of torch.optim": "优化器：adamw，或者 torch.optim 的一个类",
    'Arguments of that class, such as {"momentum": 0.9}': '该类的参数，例如 {"momentum": 0.9}',
    "Weight decay of the optimizer": "优化器的权重衰减",
    "Largest norm of the gradients; beyond it they are clipped": "梯度的最大范数；超过就裁剪",
    "Recompute activations in the backward: less memory, about a third more time": (
        "反向时重新计算激活：内存更少，时间多约三分之一"
    ),
    "Shard the frozen model over the processes of torchrun": "把冻结的模型分片到 torchrun 的各个进程",
    "Random seed of split, order, initialisation and dropout": "划分、顺序、初始化和 dropout 的随机种子",
    # Evaluation
    "When to evaluate": "什么时候评估",
    "Evaluate every N steps": "每 N 步评估一次",
    "Evaluate every N minutes": "每 N 分钟评估一次",
    "Rows of one forward in evaluations; changes no result": "评估时一次前向的行数；不影响结果",
    "Metrics beside the loss, or my_module:my_function": "损失以外的指标，或者 my_module:my_function",
    "Metric to choose the best by": "按哪个指标判断最好",
    "Keep the best adapter instead of the last one": "保留最好的适配器，而不是最后的",
    "Stop after N evaluations without improvement": "连续 N 次评估没有改善就停止",
    "Least improvement that counts": "多大的改善才算数",
    "Tokens to generate for metrics and examples": "为指标和示例生成多少 token",
    # Checkpoints and trackers
    "When to save a checkpoint": "什么时候保存检查点",
    "Save a checkpoint every N steps": "每 N 步保存一个检查点",
    "Save a checkpoint every N minutes": "每 N 分钟保存一个检查点",
    "Checkpoints to keep; the newest and the best always stay": "保留多少个检查点；最新的和最好的总会保留",
    "Trackers such as tensorboard, wandb, or none": "跟踪器，例如 tensorboard、wandb，或者 none",
    # Defaults in words
    "required": "必填",
    "none": "无",
    "no limit": "不限",
    "once an epoch": "每个 epoch 一次",
    "the model's": "由模型决定",
    "an accelerator, if any": "有加速器就用",
    "recognised": "自动识别",
    "512, or what the model reads": "512，或者模型的上限",
    "the tokenizer's": "分词器自带的",
    "the day the run begins": "训练开始的那天",
    "by the cores": "按核数",
    "by model type": "由模型类型决定",
    "all": "全部",
    "the task's": "由任务决定",
    "the first metric": "第一个指标",
    "the preset's": "由 preset 决定",
    "the task's first": "任务的第一个指标",
    "as many as pay": "实测决定",
    "what is free": "全部空闲内存",
    "the noise": "噪声",
    "any": "任意",
    "this machine": "本机",
}


def refreshed(page: str) -> str:
    """The text of ``page`` with its tables of options as the config classes have them."""
    language = "zh" if "zh" in page else "en"
    text = (ROOT / page).read_text(encoding="utf-8")
    return BLOCK.sub(lambda m: m[1] + "\n".join(_block(m[2], language)) + "\n" + m[3], text)


def _block(group: str, language: str) -> list[str]:
    if group == SHARED:
        return [_shared(language)]
    assert group in GROUPS, f"{group}: one of {', '.join(GROUPS)}"
    head = HEADS[language]
    listed = [one for one in OPTIONS.values() if one.group == group and one.help]
    return [_row(head), "|---" * len(head) + "|", *(_row(_cells(one, language)) for one in listed)]


def _cells(option: Option, language: str) -> list[str]:
    flags = ", ".join(f"`{flag}`" for flag in option.flags) if option.key != "tune.space" else ""
    choices = ", ".join(f"`{word}`" for word in option.check.choices)
    meaning = _in(language, option.help) + (("：" if language == "zh" else ": ") + choices if choices else "")
    return [flags, f"`{option.key}`", _default(option, language), meaning.replace("|", "\\|")]


def _default(option: Option, language: str) -> str:
    """What a command has without the option, and a run file without the key; those of the adapter differ."""
    if option.default is NEEDED:
        return _in(language, "required")
    value = option.default if option.starter is None else option.starter
    if option.unset and option.starter is None:
        return option.unset if re.fullmatch(r"[\d/]+", option.unset) else _in(language, option.unset)
    if value is None or value == {}:
        return _in(language, "none") if value == {} else ""
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _shared(language: str) -> str:
    from typer.main import get_command

    from loraloom.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    names = [[p.opts[0] for p in commands[name].params if p.opts[0].startswith("--")] for name in ("tune", "train")]
    both = [f"`{name}`" for name in names[0] if name in names[1] and name != "--help"]
    if language == "zh":
        return f"`loraloom tune` 还有这些 `loraloom train` 的选项：{'、'.join(both)}。"
    return f"`loraloom tune` also has these options of `loraloom train`: {', '.join(both)}."


def _in(language: str, words: str) -> str:
    return words if language == "en" else CHINESE[words]


def _row(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"  # type: ignore[arg-type]


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(refreshed(page), encoding="utf-8")
        print(f"{page}: options written")
