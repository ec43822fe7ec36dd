"""The help that all commands share."""

from __future__ import annotations

import pytest

from dit_engine.cli.arguments import Parser


def test_help_tells_defaults_that_say_something() -> None:
    parser = Parser("command", "About.")
    add = parser.add_argument
    add("--absent", help="an absent one")
    add("--flag", action="store_true", help="a flag")
    add("--empty", default="", help="an empty one")
    add("--many", nargs="+", type=int, default=[1, 2], help="many")
    add("--share", default="5%", help="a share of 100%%")
    add("--zero", type=int, default=0, help="a number")
    add("sets", nargs="*", help="places")
    text = " ".join(parser.format_help().split())
    for said in ("--many MANY [MANY ...] many (default: 1 2)", "share of 100% (default: 5%)",
                 "a number (default: 0)"):  # fmt: skip
        assert said in text
    assert text.count("(default: ") == 3


@pytest.mark.parametrize("words", [[], ["fid"], ["gflops"]])
def test_no_command_says_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from dit_bench import cli

    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "None" not in shown and "(default: )" not in shown and "(default: False)" not in shown
    assert "--json" in shown
