"""The words of the pictures, in the reader's language: English, or Chinese where the locale and a font allow it."""

from __future__ import annotations

import locale
import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Words:
    """Braces are filled in with figures."""

    # one run
    loss: str = "loss"
    step: str = "step"
    rate: str = "learning rate"
    each_step: str = "training, each step"
    smoothed: str = "training, smoothed"
    held_out: str = "held-out rows"
    on_held_out: str = "{metric} on held-out rows"
    # a search
    best: str = "recommended"
    highest: str = "first, but not recommended"
    runner_up: str = "runner-up"
    finished: str = "trained to the end"
    stopped: str = "stopped early"
    failed: str = "failed"
    to_beat: str = "to beat: {bar}"
    configurations: str = "{metric} on held-out rows, {count} configurations"
    leaders: str = "where they ended"
    stopped_at: str = "stopped at {share:.0%}"
    failed_at: str = "failed at {share:.0%}"
    first_leaders: str = "where the first {count} ended"
    tested: str = "on {rows:,} test rows that chose nothing"
    bars: str = "95 % interval, by the held-out rows"
    bars_seeds: str = "95 % interval, by the held-out rows and the seeds"
    # quality against size and time
    tradeoff: str = "{metric} against size and training time"
    parameters: str = "adapter parameters"
    seconds: str = "training time in seconds"
    front: str = "nothing smaller, or faster, is as good"
    lower: str = "{count} lie below"
    higher: str = "{count} lie above"
    # importance
    importance: str = "what the best have in common"
    share: str = "share of the importance"
    chance: str = "what shuffled scores give"
    mattered: str = "mattered: more than chance"
    not_mattered: str = "no more than chance"
    after: str = "{metric} after {share:.0%} of the steps"
    #: answers that a configuration has to beat
    answers: Mapping[str, str] | None = None

    def answer(self, given: str) -> str:
        """The answer to beat, which ``tuning.bar`` words in English."""
        for english, own in (self.answers or {}).items():
            given = given.replace(english, own)
        return given


ENGLISH = Words()
CHINESE = Words(
    loss="损失",
    step="步",
    rate="学习率",
    each_step="训练，每一步",
    smoothed="训练，平滑后",
    held_out="留出数据",
    on_held_out="留出数据上的 {metric}",
    best="推荐",
    highest="排名第一，但不推荐",
    runner_up="第二名",
    finished="训练到底",
    stopped="提前停止",
    failed="失败",
    to_beat="须超过：{bar}",
    configurations="留出数据上的 {metric}，{count} 组配置",
    leaders="最终结果",
    stopped_at="停在 {share:.0%}",
    failed_at="在 {share:.0%} 处失败",
    first_leaders="前 {count} 组的最终结果",
    tested="在 {rows:,} 行未参与任何选择的测试数据上",
    bars="95 % 区间，只含留出数据的抽样误差",
    bars_seeds="95 % 区间，含留出数据与随机种子的误差",
    tradeoff="{metric} 与大小、训练时间的关系",
    parameters="适配器参数量",
    seconds="训练时间（秒）",
    front="没有更小（或更快）而同样好的",
    lower="另有 {count} 个更低",
    higher="另有 {count} 个更高",
    importance="最好的几组配置有何共同点",
    share="重要性占比",
    chance="打乱分数后的水平",
    mattered="有影响：超过偶然",
    not_mattered="不超过偶然",
    after="训练到 {share:.0%} 时的 {metric}",
    answers={
        "always ": "总是回答 ",
        "a new head on the frozen model": "冻结模型上的新分类头",
        "the frozen model": "冻结的模型",
        "no correlation": "无相关",
    },
)


def words() -> Words:
    """Those of the reader's language, in which the pictures can be drawn."""
    from loraloom.report.picture import drawable

    return CHINESE if chinese() and drawable(CHINESE.held_out) == CHINESE.held_out else ENGLISH


def chinese() -> bool:
    """Whether the locale's messages are Chinese, by the order of POSIX."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return value.lower().startswith("zh")
    return (locale.getlocale()[0] or "").lower().startswith(("zh", "chinese"))
