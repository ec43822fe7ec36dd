"""Text of others reaches a terminal with its escapes visible, and with nothing else changed."""

from __future__ import annotations

import unicodedata

import pytest

from dit_engine.printable import first_line, one_line, printable, say

ACTING = {
    "\x1b]0;owned\x07": r"\x1b]0;owned\x07",
    "a\rb\bc": r"a\rb\x08c",
    "two\nlines\tof": r"two\nlines\tof",
    "\x9b31m\x85\x7f\x00": r"\x9b31m\x85\x7f\x00",
    "exe\u202egnp.\u2066\u200f\u061c": r"exe\u202egnp.\u2066\u200f\u061c",
    "pay\u200bpal\ufeff\u2060\u00ad\u180e": r"pay\u200bpal\ufeff\u2060\xad\u180e",
    "line\u2028paragraph\u2029": r"line\u2028paragraph\u2029",
    "joined\u200dwith\u200cnothing": r"joined\u200dwith\u200cnothing",
    "\u200d": r"\u200d",
    "\U000e0041tag": r"\U000e0041tag",
    "name of bytes \udc9b": r"name of bytes \udc9b",
    "\u3164\u034f": r"\u3164\u034f",
    "\ue000\U000fffff": r"\ue000\U000fffff",
}
HARMLESS = (
    "tench, Tinca tinca",
    r"C:\models\x1b",
    "Caf\u00e9, e\u0301",  # composed and not
    "\u9ca4\u9c7c\u3000\u3001",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",  # Hebrew, Arabic
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0915\u094d\u200d\u0937",  # Persian, Hindi
    "\U0001f469\U0001f3fd\u200d\U0001f52c 1\ufe0f\u20e3 \u2764\ufe0f",  # emoji
    "«a\u00a0b» ½ · √2 → ∞",
)


@pytest.mark.parametrize("text", ACTING)
def test_what_acts_on_a_terminal_is_escaped(text: str) -> None:
    assert printable(text) == ACTING[text]
    assert printable(printable(text)) == ACTING[text]


@pytest.mark.parametrize("text", HARMLESS)
def test_all_else_stays(text: str) -> None:
    assert printable(text) == text


def test_every_character_is_visible_or_escaped() -> None:
    """Beside Unicode's own classes of what is a control, a format or a surrogate."""
    for i in (*range(0x20000), *range(0xE0000, 0xE1000)):
        shown = printable(chr(i))
        if unicodedata.category(chr(i)) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co"):
            assert shown.isascii() and shown.startswith("\\") and shown.isprintable(), hex(i)
        else:
            assert shown == chr(i) or unicodedata.category(chr(i)) in ("Lo", "Mn"), hex(i)


def test_messages_are_one_line_of_bounded_length() -> None:
    assert one_line("a\n b\t\x1bc") == r"a b \x1bc"
    assert len(one_line("long " * 10_000)) <= 2000
    assert first_line(ValueError("\nfirst\x1b[2J\nsecond")) == r"first\x1b[2J"
    assert first_line(ValueError()) == "ValueError"


def test_lines_that_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\x1b[1m\ntwo\r")
    assert capsys.readouterr().out == "one\\x1b[1m\ntwo\\r\n"
