"""Fields of a model's config, for every kind of config: flat, composite, or without the field.

A model of several parts (text and images, encoder and decoder) keeps most fields in the configs of its parts. No other
file reads such a field. Uses only attributes of transformers' configs and imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

#: Model types that number positions starting after the padding token.
_SHIFTED = (
    *("roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod", "ernie_m", "luke", "mluke"),
    *("ibert", "lilt", "markuplm", "layoutlmv3", "esm"),
)
#: Other names of the field with the number of positions, for models with a fixed limit.
_POSITIONS = {
    "mpt": "max_seq_len",
    "led": "max_decoder_position_embeddings",
    "whisper": "max_target_positions",
    "speech_to_text": "max_target_positions",
}


def levels(config: Any) -> list[Any]:
    """``config`` and the configs of its parts, each once, outermost first."""
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
    """The config of the part that reads and writes text; ``config`` itself if the model has no parts."""
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
    """One field of one config; ``default`` if it is missing, or if it differs between layers and the config raises."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def ask(config: Any, name: str, default: Any = None) -> Any:
    """The field ``name`` of the config or of its text part; ``default`` if both lack it or have None."""
    for one in (config, text_part(config)) if config is not None else ():
        found = field(one, name)
        if found is not None:
            return found
    return default


def token(config: Any, which: str) -> int | None:
    """The id of the ``pad``, ``eos`` or ``bos`` token; the first of several."""
    found = tokens(config, which)
    return found[0] if found else None


def tokens(config: Any, which: str) -> list[int]:
    """All ids of the ``pad``, ``eos`` or ``bos`` token: a model may have several end tokens."""
    found = ask(config, f"{which}_token_id")
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]


def set_token(config: Any, which: str, number: int) -> bool:
    """Set the id of the ``which`` token at every level with text. Returns whether anything changed."""
    name, text = f"{which}_token_id", text_part(config)
    changed = False
    for one in levels(config):
        # A part without the field (a vision tower) needs none.
        if (one is config or one is text or hasattr(one, name)) and field(one, name) != number:
            setattr(one, name, number)
            changed = True
    return changed


def vocabulary(config: Any) -> int | None:
    """Size of the vocabulary in the model's config."""
    found = field(text_part(config), "vocab_size") if config is not None else None
    return found if isinstance(found, int) else None


def width(config: Any) -> int | None:
    """Size of the hidden state."""
    found = field(text_part(config), "hidden_size") if config is not None else None
    return found if isinstance(found, int) and found > 0 else None


def has_decoder_and_encoder(config: Any) -> bool:
    return bool(field(config, "is_encoder_decoder", False))


def is_decoder(config: Any) -> bool:
    """True for an encoder whose config makes it a decoder, with causal attention."""
    return bool(ask(config, "is_decoder", False))


def segments(config: Any) -> int:
    """Number of segment types (token types): 2 if the config has none."""
    found = ask(config, "type_vocab_size", 2)
    return found if isinstance(found, int) else 2


def tokens_at_most(config: Any) -> int | None:
    """The maximum number of tokens of a row; None if the config sets no limit."""
    part = text_part(config)
    kind = str(field(part, "model_type", ""))
    name = _POSITIONS.get(kind, "max_position_embeddings")
    limit = field(part, name) or field(config, name)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return None
    offset = (token(part, "pad") or 0) + 1
    return limit - offset if any(word in kind for word in _SHIFTED) else limit


_caching = Lock()
#: Configs whose cache is turned off at the moment: the object, users of ``without_cache``, the previous value.
_off: dict[int, tuple[Any, int, Any]] = {}


@contextmanager
def without_cache(config: Any) -> Iterator[None]:
    """Context in which no forward of a model with this config fills a cache of keys and values by default.

    Some forwards have no argument for it and read only the config. Safe for concurrent threads.
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
