"""Pieces of text put together are the tokenizer's own decoding of all tokens, cut before the first stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest
from batches import BASE
from texts import character_tokenizer

from e2llm.engine.text import TextStream

SAMPLE = "def naïve(x):\n    return '日本語 🙂🙃 é' # it 's fine , n't it ?  ok\n\n" * 4


def sentencepiece_like() -> Any:
    """Words that begin with ▁, bytes for the rest: decoding strips the first space and joins bytes to characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁de", "▁return", *"defrtunx():'#,.?"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def base() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def cleaning_base() -> Any:
    tokenizer = base()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


TOKENIZERS = {
    "characters": character_tokenizer,
    "bytes": base,
    "sentencepiece": sentencepiece_like,
    "cleaning": cleaning_base,
}


def pieces_of(tokenizer: Any, tokens: list[int], *stops: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in tokens:
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, stream.rest()], False


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_pieces_are_the_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    chance = random.Random(0)
    texts = [tokenizer(SAMPLE).input_ids]
    known = range(2, 258) if name == "sentencepiece" else ()  # bytes: see test_bytes_that_turn_out_to_be_no_text
    ids = [token for token in range(min(len(tokenizer), 4000)) if token not in known]
    texts += [chance.choices(ids, k=chance.randrange(1, 120)) for _ in range(60)]
    for tokens in texts:
        pieces, _ = pieces_of(tokenizer, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_characters_come_whole_and_soon(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokens = tokenizer(SAMPLE).input_ids
    pieces, _ = pieces_of(tokenizer, tokens)
    assert "\ufffd" not in "".join(pieces) and "🙂" in "".join(pieces)
    assert sum(map(bool, pieces)) > len(tokens) / 3 and pieces[-1] == "", "nothing waits for the end"


def test_half_a_character_at_the_end_is_what_decode_says() -> None:
    tokenizer = base()
    tokens = tokenizer("ab🙂").input_ids[:-1]
    pieces, _ = pieces_of(tokenizer, tokens)
    assert "\ufffd" not in "".join(pieces[:-1]) and "".join(pieces) == tokenizer.decode(tokens)


def test_bytes_that_turn_out_to_be_no_text_take_back_nothing() -> None:
    """A sentencepiece tokenizer decodes a whole run of bytes as halves when one is wrong; what was shown stays."""
    tokenizer = sentencepiece_like()
    good, wrong, word = tokenizer("🙂").input_ids[1:], 2 + 0xFF, tokenizer("return").input_ids
    pieces, _ = pieces_of(tokenizer, [*good, wrong, *word])
    assert pieces[3] == "🙂" and "".join(pieces).startswith("🙂\ufffd") and "".join(pieces).endswith(" return")


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_stop_strings(name: str) -> None:
    """Wherever the stop stands, across tokens or inside one: the text before it, no sooner and no later."""
    tokenizer = TOKENIZERS[name]()
    tokens = tokenizer(SAMPLE).input_ids
    chance = random.Random(1)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    for _ in range(60):
        start = chance.randrange(len(whole) - 12)
        stops = (whole[start : start + chance.randint(1, 9)], "def nothing")
        pieces, stopped = pieces_of(tokenizer, tokens, *stops)
        assert stopped and "".join(pieces) == whole[: whole.index(stops[0])]
        read = tokenizer.decode(tokens[: len(pieces) - 1], skip_special_tokens=True)
        assert stops[0] not in read, "the token before did not end it yet"


def test_the_beginning_of_a_stop_is_held_back_and_let_go() -> None:
    stream = TextStream(character_tokenizer(), ("END", "DONE"))
    shown = [stream.push(ord(c))[0] for c in "aENxDOEND"]
    assert shown == ["a", "", "", "ENx", "", "", "DO", "", ""]
    assert stream.rest() == ""
    unfinished = TextStream(character_tokenizer(), ("END",))
    assert [unfinished.push(ord(c)) for c in "EN"] == [("", False), ("", False)]
    assert unfinished.rest() == "EN" and unfinished.rest() == ""


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert TextStream(None, ()).push(5) == ("", False)


def test_long_texts_are_decoded_a_few_tokens_at_a_time() -> None:
    tokenizer, longest = base(), 0

    class Counting:
        clean_up_tokenization_spaces = False

        def decode(self, tokens: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return str(tokenizer.decode(tokens, **options))

    tokens = tokenizer(SAMPLE * 10).input_ids
    pieces, _ = pieces_of(Counting(), tokens)
    assert len(tokens) > 500 and longest < 40 and "".join(pieces) == tokenizer.decode(tokens)
