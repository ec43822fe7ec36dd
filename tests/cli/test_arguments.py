"""The help that all commands share."""

from __future__ import annotations

from importlib import import_module

import pytest

from dit_engine.console.parser import Parser


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


@pytest.mark.parametrize(
    ("module", "words", "refused"),
    [
        ("dit_engine.cli.generate", ["--label", "3"], "--label 3"),
        ("dit_engine.cli.train", ["-o", "x", "--quie"], "--quie"),
        ("dit_export.cli", ["onnx", "-o", "x", "--overw"], "--overw"),
        ("dit_export.cli", ["triton", "-o", "x", "--max-batch", "8"], "--max-batch 8"),
        ("dit_bench.cli", ["--model", "S/2", "--batc=2"], "--batc=2"),
        ("dit_bench.cli", ["fid", "a", "b", "--feature=lite0"], "--feature=lite0"),
        ("dit_bench.cli", ["parity", "--sample=2"], "--sample=2"),
    ],
)
def test_an_option_is_written_in_full(
    module: str, words: list[str], refused: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new option could take the abbreviation of an old one in a script."""
    with pytest.raises(SystemExit) as left:
        import_module(module).main(words)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: unrecognized arguments: {refused} (see ")
