"""Questions to a model's config, answered for every config: flat ones, composite ones, those that lack the field.

A model of several parts (text and images, encoder and decoder) keeps most fields in the configs of its parts. No other
file reads such a field. Knows transformers' configs by their attributes alone and imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

#: Model types that number positions from the padding token on.
_SHIFTED = (
    *("roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod", "ernie_m", "luke", "mluke"),
    *("ibert", "lilt", "markuplm", "layoutlmv3", "esm"),
)
#: The number of positions under other names, of models that cannot read more.
_POSITIONS = {
    "mpt": "max_seq_len",
    "led": "max_decoder_position_embeddings",
    "whisper": "max_target_positions",
    "speech_to_text": "max_target_positions",
}


def levels(config: Any) -> list[Any]:
    """``config``, and the configs of the parts in it, each once, the outermost first."""
    found: list[Any] = []
    waiting = [config]
    while waiting:
        one = waiting.pop(0)
        if any(one is other for other in found):
            continue
        found.append(one)
        waiting += [value for value in vars(one).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]
    return found


def text_part(config: Any) -> Any:
    """The config of the part that reads and writes text: ``config`` itself where there are no parts."""
    get = getattr(config, "get_text_config", None)
    if get is None:
        return config
    try:
        return get()
    except ValueError:  # several parts with text
        try:
            return get(decoder=True)
        except ValueError:
            return config


def field(config: Any, name: str, default: Any = None) -> Any:
    """One field of one config; ``default`` where it has none, or another for each layer, which some raise for."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def ask(config: Any, name: str, default: Any = None) -> Any:
    """The field ``name`` of the config or of its text part; ``default`` where neither has it, or it is None."""
    for one in (config, text_part(config)) if config is not None else ():
        found = field(one, name)
        if found is not None:
            return found
    return default


def token(config: Any, which: str) -> int | None:
    """The number of the ``pad``, ``eos`` or ``bos`` token; of several end tokens the first."""
    found = tokens(config, which)
    return found[0] if found else None


def tokens(config: Any, which: str) -> list[int]:
    """All numbers of the ``pad``, ``eos`` or ``bos`` token: a model may end a text with any of several."""
    found = ask(config, f"{which}_token_id")
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]


def set_token(config: Any, which: str, number: int) -> bool:
    """Make ``number`` the ``which`` token at every level that has text. Returns whether anything changed."""
    name, text = f"{which}_token_id", text_part(config)
    changed = False
    for one in levels(config):
        # A part without the field (a vision tower) needs none.
        if (one is config or one is text or hasattr(one, name)) and field(one, name) != number:
            setattr(one, name, number)
            changed = True
    return changed


def vocabulary(config: Any) -> int | None:
    """Tokens that the model's config counts."""
    found = field(text_part(config), "vocab_size") if config is not None else None
    return found if isinstance(found, int) else None


def width(config: Any) -> int | None:
    """Numbers in a hidden state."""
    found = field(text_part(config), "hidden_size") if config is not None else None
    return found if isinstance(found, int) and found > 0 else None


def has_decoder_and_encoder(config: Any) -> bool:
    return bool(field(config, "is_encoder_decoder", False))


def is_decoder(config: Any) -> bool:
    """An encoder's config that is set to decode: it reads a text in one direction."""
    return bool(ask(config, "is_decoder", False))


def segments(config: Any) -> int:
    """Kinds of segments that the model tells apart: 2 where its config does not say."""
    found = ask(config, "type_vocab_size", 2)
    return found if isinstance(found, int) else 2


def tokens_at_most(config: Any) -> int | None:
    """How many tokens a model reads at once; None where its config sets no limit."""
    part = text_part(config)
    kind = str(field(part, "model_type", ""))
    name = _POSITIONS.get(kind, "max_position_embeddings")
    limit = field(part, name) or field(config, name)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return None
    offset = (token(part, "pad") or 0) + 1
    return limit - offset if any(word in kind for word in _SHIFTED) else limit


_caching = Lock()
#: Configs whose cache is off for now: the object, forwards that need it off, what it said before.
_off: dict[int, tuple[Any, int, Any]] = {}


@contextmanager
def without_cache(config: Any) -> Iterator[None]:
    """Within it, no forward of a model with this config fills a cache of keys and values unless it is asked to.

    Not every forward has an argument for it: some read their config alone. Threads may be in it together.
    """
    mine = [one for one in levels(config) if hasattr(one, "use_cache")] if config is not None else []
    with _caching:
        for one in mine:
            _, count, before = _off.get(id(one), (one, 0, one.use_cache))
            _off[id(one)] = (one, count + 1, before)
            one.use_cache = False
    try:
        yield
    finally:
        with _caching:
            for one in mine:
                _, count, before = _off.pop(id(one))
                if count > 1:
                    _off[id(one)] = (one, count - 1, before)
                else:
                    one.use_cache = before
