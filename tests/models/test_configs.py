"""Every config that transformers has answers what loraloom asks of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from loraloom.models import configs


def every_config() -> Iterator[tuple[str, Any]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # cannot be built without its parts
            continue
        yield kind, config


def test_every_config_answers_every_question_and_keeps_a_padding_token() -> None:
    count = 0
    for kind, config in every_config():
        count += 1
        part = configs.text_part(config)
        assert any(part is one for one in configs.levels(config)), kind
        for which in ("pad", "eos", "bos"):
            assert all(isinstance(number, int) for number in configs.tokens(config, which)), kind
        size, limit = configs.vocabulary(config), configs.tokens_at_most(config)
        assert size is None or size > 0, kind
        assert limit is None or limit > 0, kind
        assert isinstance(configs.segments(config), int), kind
        assert isinstance(configs.is_decoder(config), bool), kind
        assert isinstance(configs.has_decoder_and_encoder(config), bool), kind
        configs.set_token(config, "pad", 7)
        assert configs.token(config, "pad") == configs.token(part, "pad") == config.pad_token_id == 7, kind
        assert not configs.set_token(config, "pad", 7), kind
    assert count > 400


def test_the_text_part_answers_where_the_whole_does_not() -> None:
    from transformers import Gemma3Config, MptConfig, Qwen2VLConfig, WhisperConfig

    gemma = Gemma3Config(text_config={"vocab_size": 99, "pad_token_id": 5, "max_position_embeddings": 77})
    assert (configs.vocabulary(gemma), configs.token(gemma, "pad"), configs.tokens_at_most(gemma)) == (99, 5, 77)
    assert configs.vocabulary(Qwen2VLConfig()) == 152064
    assert configs.tokens_at_most(MptConfig(max_seq_len=33)) == 33
    assert configs.tokens_at_most(WhisperConfig(max_target_positions=44)) == 44
    assert configs.tokens(Gemma3Config(eos_token_id=[1, 106]), "eos") == [1, 106]


def test_the_cache_is_off_at_every_level_until_the_last_thread_is_out() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config()
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with configs.without_cache(config):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with configs.without_cache(config):
        thread.start()
        assert inside.wait(10)
        assert config.text_config.use_cache is False
    assert config.text_config.use_cache is False
    done.set()
    thread.join()
    assert config.text_config.use_cache is True


@pytest.mark.parametrize("name", ["use_cache", "pad_token_id"])
def test_no_config_at_all_is_an_answer_too(name: str) -> None:
    assert configs.ask(None, name) is None
    with configs.without_cache(None):
        pass
