from hypothesis import given
from hypothesis import strategies as st

from hrm_esp import ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.text(), st.booleans(), st.booleans())
def test_any_text_round_trips(text: str, bos: bool, eos: bool) -> None:
    ids = tokenizer.encode(text, add_bos=bos, add_eos=eos)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode()) + bos + eos
    assert (ids[:1] == [257]) == bos and (ids[-1:] == [258]) == eos


@given(st.lists(st.integers(0, 259)))
def test_any_ids_decode_and_special_ones_are_ignored(ids: list[int]) -> None:
    assert tokenizer.decode(ids) == tokenizer.decode([i for i in ids if i < 256])


def test_numbers_of_the_special_tokens() -> None:
    special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.plan_id)
    assert (*special, tokenizer.vocab_size) == (256, 257, 258, 259, 260)
