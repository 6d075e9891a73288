"""The space of a search: which keys of a run vary, between what, and what a configuration's values mean.

Some choices are words. For ``lora.lora_alpha``: ``"r"``, ``"2r"`` and so on are multiples of the trial's rank, and
``"rslora"`` scales by alpha / sqrt(r) instead, with the alpha that gives a rank of 16 the scale 2. For
``lora.target_modules``: ``"q-v"`` and ``"attention"`` are found in the model, ``"all-linear"`` is ``LoraConfig``'s.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraloom.config.keys import OPTIONS, check_key
from loraloom.config.lora_checks import split_names
from loraloom.config.runfile import with_values
from loraloom.config.train import TrainConfig
from loraloom.config.tune import PRESET
from loraloom.errors import ConfigError, nearest
from loraloom.tuning.params import Categorical, Range, label, read_range
from loraloom.tuning.targets import SETS, resolve_targets

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from torch import nn

ALPHA, TARGETS, RANK, RSLORA = "lora.lora_alpha", "lora.target_modules", "lora.r", "lora.use_rslora"
RATE = "train.learning_rate"
#: The alpha of "rslora": 8 / sqrt(16) = 2, the scale that "2r" has at every rank.
RSLORA_ALPHA = 8

_NAMES = (TARGETS, "lora.exclude_modules", "lora.modules_to_save")
_PATTERNS = ("lora.rank_pattern", "lora.alpha_pattern")
_LAYERS = ("lora.layers_to_transform", "lora.layers_pattern")
#: Keys that are checked against the model.
_STRUCTURE = (*_NAMES, *_PATTERNS, *_LAYERS)
_VARY = {one.key for one in OPTIONS.values() if one.search == "varies"}

#: Known before any trial, best first: all linear layers beat attention alone (Schulman et al. 2025, "LoRA Without
#: Regret"), and twice the rank is a good alpha. Numbers: the nearer, the better. The rate is for this rank: at alphas
#: that are multiples of the rank, the best rate falls with the square root of the rank.
_KNOWN: dict[str, Any] = {
    TARGETS: ["all-linear", "attention", "q-v"],
    ALPHA: ["2r", "r", "rslora"],
    RANK: 16,
    "lora.lora_dropout": 0.05,
    RATE: 1e-3,
}


@dataclass(frozen=True)
class Preset:
    """How far a search goes: its trials, the best of them that are repeated with ``seeds`` more seeds, its space."""

    trials: int
    finalists: int
    seeds: int
    space: Mapping[str, Any]


_WIDE = {
    RANK: [4, 8, 16, 32, 64],
    ALPHA: ["r", "2r", "rslora"],
    TARGETS: list(SETS),
    "lora.lora_dropout": [0.0, 0.05, 0.1, 0.2],
    # Ten times the rates of full fine-tuning, which are 5e-6 to 5e-4 from the largest models to the smallest.
    "train.learning_rate": {"log": [5e-5, 5e-3]},
}
_NARROWER = {
    RANK: [8, 16, 32],
    TARGETS: ["attention", "all-linear"],
    "lora.lora_dropout": [0.0, 0.1],
    "train.learning_rate": {"log": [2e-4, 4e-3]},
}
_WIDER = {
    RANK: [2, 4, 8, 16, 32, 64, 128],
    ALPHA: ["r", "2r", "4r", "rslora"],
    "lora.lora_dropout": [0.0, 0.05, 0.1, 0.2, 0.3],
    "train.learning_rate": {"log": [2e-5, 1e-2]},
    "train.loraplus_lr_ratio": [1.0, 4.0, 16.0],
    "train.weight_decay": [0.0, 0.01, 0.1],
}
PRESETS = {
    "quick": Preset(8, 2, 1, _WIDE | _NARROWER),
    "standard": Preset(16, 3, 2, _WIDE),
    "thorough": Preset(64, 4, 3, _WIDE | _WIDER),
}


@dataclass(frozen=True)
class Space:
    """What varies (``params``) and what the space sets for all trials (``fixed``).

    A configuration maps the hyperparameters' keys to numbers and labels, as ``suggest`` gives it and a study keeps it;
    ``to_options`` translates it into options of a training.
    """

    params: dict[str, Categorical | Range]
    fixed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], base: TrainConfig) -> Space:
        """The space of a run file's ``tune.space``: dotted keys to a list of choices, a range, or one value.

        ``{log: [low, high]}`` is even in the logarithm; ``{range: [low, high]}``, with an optional ``step``, is even,
        over whole numbers where both ends are whole.

        Raises:
            ConfigError: an unknown key, one that cannot vary, or values that the options of ``base`` refuse. Begins
                with ``space.`` and the key.
        """
        if not isinstance(raw, Mapping) or not raw:
            raise ConfigError(f"space: must map keys such as lora.r to lists or ranges, found {raw!r}")
        params: dict[str, Categorical | Range] = {}
        fixed: dict[str, Any] = {}
        for key, value in raw.items():
            _check_varies(key)
            if isinstance(value, Mapping) and key not in _PATTERNS:
                params[key] = found = read_range(f"space.{key}", value)
                # 0 is the one number between two good ones that may be bad, as for alpha.
                for number in (found.low, found.high, *((0,) if found.low < 0 < found.high else ())):
                    _check_value(key, number, base)
            elif isinstance(value, list | tuple):
                choices = _choices(key, value, base)
                if len(choices.values) > 1:
                    params[key] = choices
                else:
                    fixed[key] = next(iter(choices.values.values()))
            else:
                fixed[key] = _normal(key, value)
                _check_value(key, fixed[key], base)
        _check_together(params, fixed, base)
        return cls(params, fixed)

    @classmethod
    def default(cls, base: TrainConfig, preset: str = "standard") -> Space:
        """The space of a preset: rank, alpha, targets, dropout and learning rate vary and override ``base``."""
        return cls.parse(PRESETS[PRESET.check.test("preset", preset)].space, base)

    @property
    def size(self) -> int | None:
        """How many configurations there are; None where a range is continuous."""
        sizes = [param.size for param in self.params.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: param.distribution() for key, param in self.params.items()}

    def grid(self) -> Iterator[dict[str, Any]]:
        """All configurations.

        Raises:
            ConfigError: a range is continuous.
        """
        values = [param.grid(key) for key, param in self.params.items()]
        return (dict(zip(self.params, point, strict=True)) for point in itertools.product(*values))

    def order(self) -> dict[str, list[Any]]:
        """Labels from low to high of hyperparameters whose values are ordered but no numbers: multiples of the rank."""
        ordered = {key: list(param.order) for key, param in self.params.items()}
        return {key: labels for key, labels in ordered.items() if any(isinstance(entry, str) for entry in labels)}

    def prior(self, count: int, by_rank: bool = True) -> list[dict[str, Any]]:
        """The first configurations to try: the best known one, then such as spread over the space around it.

        Always the same, all different; fewer than ``count`` where the space has no more. What spreads evenly is
        ``rate · sqrt(rank)``, in which one optimum serves all ranks; without ``by_rank``, as in searches of 0.2 and
        before, the rate.
        """
        liked = {key: _liked(key, param) for key, param in self.params.items()}
        ranges_first = sorted(self.params, key=lambda key: isinstance(self.params[key], Categorical))
        steps = dict(zip(ranges_first, _steps(len(self.params))))
        shares = ({key: i * step % 1 for key, step in steps.items()} for i in range(20 * count))
        spread = (self._point(share, liked, by_rank) for share in shares)
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        # A small space may be used up before chance finds its last corners.
        for values in itertools.chain(spread, self.grid() if self.size is not None else ()):
            if len(found) == count:
                break
            found.setdefault(tuple(values.values()), values)
        return list(found.values())

    def _point(self, shares: Mapping[str, float], liked: Mapping[str, list[Any]], by_rank: bool) -> dict[str, Any]:
        values = {key: param.point(shares[key], liked[key]) for key, param in self.params.items()}
        rate = self.params.get(RATE)
        if by_rank and isinstance(rate, Range) and RANK in values:
            values[RATE] = rate.point(shares[RATE], liked[RATE], math.sqrt(_KNOWN[RANK] / values[RANK]))
        return values

    def to_options(self, values: Mapping[str, Any], base: TrainConfig, model: nn.Module | None = None) -> TrainConfig:
        """The options of a configuration's training. ``model`` says which modules "q-v" and "attention" are.

        Raises:
            ConfigError: values that do not go together, or a set of targets without a model.
        """
        changes = dict(self.fixed)
        for key, value in values.items():
            param, plain = self.params.get(key), _normal(key, value)
            changes[key] = param.values.get(label(plain), plain) if isinstance(param, Categorical) else plain
        if ALPHA in changes:
            changes |= self._scale(changes[ALPHA], changes.get(RANK, base.lora.r))
        word = changes.get(TARGETS)
        if isinstance(word, str) and word in SETS:
            if model is None and word != SETS[-1]:
                raise ConfigError(f"space.{TARGETS}: {word!r} needs a model, and none was given")
            changes[TARGETS] = word if model is None else resolve_targets(model, word)
        return with_values(base, changes)

    def _scale(self, alpha: Any, r: int) -> dict[str, Any]:
        if alpha == "rslora":
            return {ALPHA: RSLORA_ALPHA, RSLORA: True}
        if isinstance(alpha, str):
            alpha = float(alpha[:-1] or 1) * r
        param = self.params.get(ALPHA)
        # Where "rslora" is one of the choices, the others are plain LoRA even if the base is rslora.
        plain = {RSLORA: False} if isinstance(param, Categorical) and "rslora" in param.values else {}
        return {ALPHA: int(alpha) if alpha == int(alpha) else alpha, **plain}

    def check(self, model: nn.Module, base: TrainConfig) -> None:
        """Check that all choices of targets and other names of modules fit the model (which may have no weights).

        Raises:
            ConfigError: choices that contradict each other; TargetError: one that matches nothing.
        """
        from loraloom.lora.targets import plan

        structure = {key: param for key, param in self.params.items() if key in _STRUCTURE}
        rest = {key: value for key, value in self.prior(1)[0].items() if key not in structure}
        for combination in Space(structure).grid():
            values = combination | rest
            try:
                plan(model, self.to_options(values, base, model).lora)
            except ConfigError as error:
                name = str(error).removeprefix("lora.")
                key = f"lora.{name.partition(':')[0]}"
                if key not in self.params and key not in self.fixed:
                    raise
                hint = nearest(str(values[TARGETS]), SETS) if key == TARGETS and TARGETS in values else ""
                raise type(error)(f"space.lora.{name}{hint}") from None

    def edges(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Key → "low" or "high" for ordered hyperparameters whose value is at an end that can be moved out."""
        found = {}
        for key, value in values.items():
            param = self.params.get(key)
            side = param.edge(value) if param and param.holds(value) else None
            least = 1 if key in (RANK, "train.batch_size", "train.gradient_accumulation_steps") else 0
            if side and not (side == "low" and value == least):
                found[key] = side
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``parse`` reads as this space."""
        return {key: param.raw() for key, param in self.params.items()} | {key: [v] for key, v in self.fixed.items()}


# -- checks -----------------------------------------------------------------------------------------------------------


def _normal(key: str, value: Any) -> Any:
    """A choice in one spelling: "1r" is "r", names with commas between are a list."""
    if key == ALPHA and isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)?r", value.strip().lower())
        if value.strip().lower() != "rslora" and (found is None or float(found[1] or 1) == 0):
            raise ConfigError(
                f"space.{key}: must be a number, a multiple of the rank such as 2r, or rslora, found {value!r}"
            )
        if found is None:
            return "rslora"
        factor = float(found[1] or 1)
        return "r" if factor == 1 else f"{factor:g}r"
    if key in _NAMES and isinstance(value, str):
        if value.lower() in SETS:
            return value.lower()
        return split_names(f"space.{key}", value)
    if key == TARGETS and isinstance(value, list | tuple) and not value:
        raise ConfigError(
            f"space.{key}: a choice is an empty list, which adapts nothing; name modules, or leave it out"
        )
    return list(value) if isinstance(value, tuple) else value


def _check_varies(key: Any) -> None:
    try:
        check_key(str(key))
    except ConfigError as error:
        raise ConfigError(f"space.{error}") from None
    if key not in _VARY:
        why = "; for more seeds see tune.seeds" if key == "train.seed" else ""
        raise ConfigError(
            f"space.{key}: must be the same in all trials{why}; set it in its own section of the run file"
        )


def _choices(key: str, given: Iterable[Any], base: TrainConfig) -> Categorical:
    values: dict[Any, Any] = {}
    for entry in given:
        value = _normal(key, entry)
        name = label(value)
        if name in values:
            raise ConfigError(f"space.{key}: {name} is given twice; keep one")
        _check_value(key, value, base)
        values[name] = value
    if not values:
        raise ConfigError(f"space.{key}: the list is empty; give choices, or leave the key out")
    if all(isinstance(name, int | float) and not isinstance(name, bool) for name in values):
        return Categorical(values, tuple(sorted(values)))
    multiples = [name for name in values if isinstance(name, str) and name != "rslora"]
    if key == ALPHA and len(multiples) == len(values) - ("rslora" in values):
        return Categorical(values, tuple(sorted(multiples, key=lambda name: float(name[:-1] or 1))))
    return Categorical(values)


def _check_value(key: str, value: Any, base: TrainConfig) -> None:
    """Raise what the options raise. Words were checked before, or are checked against the model."""
    if isinstance(value, str) and (key == ALPHA or (key == TARGETS and value in SETS)):
        return
    try:
        with_values(base, {key: value})
    except ConfigError as error:
        raise ConfigError(f"space.{error}") from None


def _check_together(params: Mapping[str, Categorical | Range], fixed: Mapping[str, Any], base: TrainConfig) -> None:
    if not params:
        raise ConfigError("space: nothing varies; give a key two choices or a range")
    given = {**params, **fixed}
    alpha = given.get(ALPHA)
    if RSLORA in given and (alpha == "rslora" or (isinstance(alpha, Categorical) and "rslora" in alpha.values)):
        raise ConfigError(f"space.{RSLORA}: contradicts the choice rslora of {ALPHA}; keep one of the two")
    if "train.epochs" in given and ("train.max_steps" in given or base.max_steps is not None):
        raise ConfigError("space.train.epochs: has no effect, because max_steps is given; keep one of the two")


# -- what is known ----------------------------------------------------------------------------------------------------


def _liked(key: str, param: Categorical | Range) -> list[Any]:
    """Labels of ``param``, best known first; for a range the one best number, if one is known."""
    known = _KNOWN.get(key)
    if isinstance(param, Range):
        return [] if known is None or isinstance(known, list) else [known]
    labels = list(param.values)
    if isinstance(known, list):
        return sorted(labels, key=lambda name: known.index(name) if name in known else len(known))
    if known is None or not param.order:
        return labels
    # Ranks and rates are near by their ratio; the added constant lets a dropout of 0 have one.
    return sorted(labels, key=lambda name: abs(math.log((name + 1e-2) / (known + 1e-2))))


def _steps(count: int) -> list[float]:
    """Steps whose multiples, modulo 1, fill a cube of ``count`` dimensions evenly (Roberts 2018, the R sequence).

    First those that fill a line most evenly by themselves: the nearest to the golden section.
    """
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (count + 1))
    return sorted((root ** -(i + 1) for i in range(count)), key=lambda step: abs(step - 0.618))
