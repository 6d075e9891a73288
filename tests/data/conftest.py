"""Tokenizers of the three common kinds, trained on a few sentences: word pieces, bytes, and pieces with ``▁``."""

from __future__ import annotations

from typing import Any

import pytest

SENTENCES = [
    "the cat sat on the mat in London",
    "Angela Merkel met Barack Obama in New York, on Monday",
    "what is this? a cat. who sat on the mat? the cats",
    "translate English to German: the house is wonderful",
    "das Haus ist wunderbar",
] * 4


@pytest.fixture(scope="session")
def word_pieces() -> Any:
    """As BERT has it: two segments, [CLS] and [SEP]."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "in", "who", "what", "is"]
    words += [chr(c) for c in range(ord("a"), ord("z") + 1)] + [f"##{chr(c)}" for c in range(ord("a"), ord("z") + 1)]
    words += ["##s", "##ela", "##don", "lon", "ang", "new", "york", "merkel", "obama", "monday", ",", ".", "?", "##kel"]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(dict.fromkeys(words))})


@pytest.fixture(scope="session")
def byte_pieces() -> Any:
    """As GPT-2 has it: words carry the space in front of them; no special tokens around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def marked_pieces() -> Any:
    """As T5 has it: pieces of a unigram model, the end of the text behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(SENTENCES, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
