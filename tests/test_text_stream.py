"""Token bytes become whole characters, and a stop string is never shown, however the text is cut into tokens."""

from collections.abc import Sequence

from edgeft.runtimes.text_stream import TextStream
from hypothesis import given
from hypothesis import strategies as st


def play(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What is shown after each piece, and at the end; nothing is pushed once a stop string was met."""
    stream, shown = TextStream(stop), []
    for piece in pieces:
        shown.append(stream.push(piece))
        if stream.stopped:
            break
    return [*shown, stream.flush()], stream


def single(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


def test_a_character_waits_for_its_last_byte() -> None:
    assert play(single("é😀"))[0] == ["", "é", "", "", "", "😀", ""]


def test_bytes_that_are_no_character_are_replaced_and_the_rest_goes_on() -> None:
    assert "".join(play([b"a\xff", b"b\xe2\x82", b"c"])[0]) == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    assert play([b"a", b"\xf0\x9f"])[0] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_what_may_begin_a_stop_string_is_held_until_it_is_certain() -> None:
    shown, stream = play([b"one", b" <", b"e", b"x", b" <e", b"nd", b"> two"], ["<end>"])
    assert shown == ["one", " ", "", "<ex", " ", "", "", ""]
    assert stream.stopped


def test_held_text_comes_out_when_the_answer_ends_before_the_stop_string_does() -> None:
    assert play([b"a", b"<en"], ["<end>"])[0] == ["a", "", "<en"]


def test_a_stop_string_that_overlaps_itself() -> None:
    assert "".join(play(single("xaabaabaac"), ["aabaac"])[0]) == "xaab"


def test_after_a_stop_string_nothing_comes_any_more() -> None:
    stream = TextStream(["!"])
    assert (stream.push(b"a!b"), stream.push(b"c"), stream.flush()) == ("a", "", "")


def test_empty_stop_strings_mean_nothing() -> None:
    assert "".join(play(single("abc"), ["", ""])[0]) == "abc"


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    text = draw(st.text(st.sampled_from("abé😀\n"), max_size=30))
    data = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return text, [data[low:high] for low, high in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(cut_texts(), st.lists(st.text(st.sampled_from("abé😀\n"), min_size=1, max_size=4), max_size=3))
def test_the_cuts_do_not_matter(cut: tuple[str, list[bytes]], stop: list[str]) -> None:
    text, pieces = cut
    shown, stream = play(pieces, stop)
    ends = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
    assert "".join(shown) == (text[: min(ends)[1]] if ends else text)
    assert stream.stopped == bool(ends)
