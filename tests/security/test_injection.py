"""Text from others cannot act as syntax in configurations, Markdown, HTML, CSV and commands."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny import tiny_vae

from dit_bench.cli import main as bench
from dit_bench.outputs import csv_text
from dit_bench.show.documents import report_markdown, update_document
from dit_engine.config import ModelConfig
from dit_engine.io.printable import markdown_text
from dit_engine.training.log import drop_rows_after, plot_losses
from dit_export.bundle import Bundle, Graph, TensorSpec
from dit_export.server.configuration import (
    ServingOptions,
    graph_config,
    pipeline_config,
    to_pbtxt,
)
from dit_export.server.repository import readme

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
made_up = import_module("made_up")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
BREAKS = 'x"\n}\nbackend: "python"\n#`| </script><img src=x onerror=alert(1)> [a](javascript:b)\\'


def bundle(names: tuple[str, ...] | None = None, **changes: Any) -> Bundle:
    """A bundle without files; changes: to the first input of the transformer."""
    config = ModelConfig(2, 48, 2, 2, 8, num_classes=4)
    x = replace(TensorSpec("x", "float32", ("N", 4, 8, 8)), **changes)
    graphs = {
        name: Graph(name, f"{name}.onnx", "fp32", (x,), (TensorSpec("y", "float32", ("N", 3)),))
        for name in ("transformer", "guided_step", "vae_decoder")
    }
    vae = tiny_vae().config
    producer = {"producer": f"dit-engine {BREAKS}"}
    return Bundle(Path("x"), config, vae, names, "fp32", 20, "onnxruntime", BREAKS, BREAKS, 3,
                  graphs, producer)  # fmt: skip


def test_names_of_tensors_are_names() -> None:
    for name in (BREAKS, "", "é", "x\n", {"name: 1 }\nbackend": 'python"'}, "x" * 100):
        said = r"^tensor name .*: letters, digits and _ are allowed$"
        with pytest.raises(ValueError, match=said):
            graph_config("dit_transformer", bundle(name=name), ServingOptions())


def test_text_cannot_end_its_quotation_marks() -> None:
    """Also checked with the parser that the server uses, if it is installed."""
    hostile: Any = ("N", BREAKS)
    for text in (
        graph_config("dit_transformer", bundle(shape=hostile), ServingOptions()),
        pipeline_config(bundle(), ServingOptions()),
    ):
        bare = re.sub(r'"(?:[^"\\\n]|\\[0-7]{3}|\\["\\])*"', '""', text)
        assert not re.search(r"[^\w:{}\[\], \n\"-]", bare, re.ASCII)
        assert bare.count("{") == bare.count("}")
    service = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = import_module("google.protobuf.text_format")
    written = graph_config("dit_transformer", bundle(), ServingOptions())
    read = text_format.Parse(written, service.ModelConfig())
    assert read.parameters["checkpoint"].string_value == BREAKS and read.backend == ""


def test_other_values_are_refused() -> None:
    for value in (None, 0.5, [1, "a"], [True]):
        with pytest.raises(ValueError, match=r"is not a value of a config\.pbtxt$"):
            to_pbtxt({"a": value})
    options: Any = {"instances": "1\n}", "pipelines": 0, "max_batch_size": 2**31,
                    "queue_delay_us": -1, "accelerator": 'cuda" }'}  # fmt: skip
    for name, value in options.items():
        with pytest.raises(ValueError, match=rf"^{name} [^\n]*\Z"):
            ServingOptions(**{name: value}).checked()


def test_the_readme_of_a_repository() -> None:
    """Hostile names change no fence and no table, and are single arguments of commands."""
    names = ("```\n# owned\n", "a | b <b>c</b> `d` [e](javascript:f)", "$(id); 'g'", "-h")
    plain, made = (readme(bundle(each), ServingOptions()) for each in (None, names))
    assert made.count("```") == plain.count("```") and made.count("\n") == plain.count("\n")
    (row,) = (line for line in made.split("\n") if line.startswith("| `label_names` "))
    assert row.count("|") == 4 and not re.search(r"[<>\[\]*]", row)
    for given, arguments in ((names, ["0", "1"]), (names[2:] * 2, ["$(id); 'g'", "1"])):
        made = readme(bundle(given), ServingOptions())
        (line,) = (line for line in made.split("\n") if line.startswith("python client.py"))
        assert shlex.split(line, comments=True)[5:] == arguments


def test_markdown_is_text() -> None:
    hostile = f"{BREAKS} **a** www.a.b https://a.b <!-- /cpu --> &lt; a\r\n# b"
    made = markdown_text(hostile)
    assert not re.search(r"[<>|`*\[\]\\\n\r]|://|www\.", made)
    assert html.unescape(made).split() == hostile.split()
    kept = "lean bf16 (AMD EPYC, 3.1 GHz @ 2): 4×256×1152 – 0.5 % ÷ x_y -1"
    assert markdown_text(kept) == kept


REPORTS = {
    "cpu-amd-epyc.json": "XL/2, batch 2",
    "builtin-quality.json": "FD-Lite0",
    "operators-cpu-amd-epyc.json": "AMD EPYC",
    "paper-models-cpu.json": "AMD EPYC",
    "parity-builtin.json": "builtin",
    "scaling.json": "FD-Lite0",
}


@pytest.mark.parametrize("name", REPORTS)
def test_tables_of_documents(name: str) -> None:
    """A hostile report changes only the text of cells: tables and blocks stay complete."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    report = json.loads(text)
    block, before = report["kind"], report_markdown(report)
    hostile = f"{BREAKS}\n<!-- /{block} -->\n| a | b |\n```"
    report = json.loads(text.replace(json.dumps(REPORTS[name]), json.dumps(hostile)))
    after = report_markdown(report)
    assert "onerror" in after
    assert "<" not in after and not re.search(r"\]\(|(?<!\\)```", after)
    for one, other in zip(before.split("\n"), after.split("\n"), strict=True):
        assert one.count("|") == other.count("|")
    document = f"<!-- {block} -->\n<!-- /{block} -->\nthe end\n"
    assert update_document(document, block, after).count("<!--") == 2


def test_cells_are_not_formulas() -> None:
    for formula in ("=1+1", "+1", "-cmd|' /C calc'!A0", "@SUM(1)", "\t=1", " =1", "\uff1d1"):
        report = made_up.report()
        report["rows"][0] |= {"model": formula, "error": -1.5}
        first = next(csv.DictReader(io.StringIO(csv_text(report))))
        assert first["model"].startswith(("'", "\\")) and first["model"].isprintable()
        assert first["error"] == "-1.5"


class Tags(HTMLParser):
    """The tags and attributes that a browser finds."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def test_the_page(tmp_path: Path) -> None:
    """The same tags and attributes, whatever the texts are."""
    found = []
    for text in ("name", f"{BREAKS}' onclick='a\" onclick=\"b <!-- ]]> <style>"):
        report = made_up.report()
        report["created"] = report["settings"]["sampler"] = text
        report["command"] = report["machine"]["instruction_sets"] = [text]
        report["machine"] |= {"cpu": text, "platform": text, "python": text}
        report["machine"]["versions"] = {text: text}
        for row in (*report["models"], *report["rows"]):
            row["model"] = text
        report["rows"][-1]["reason"] = text
        (tmp_path / "a.json").write_text(json.dumps(report))
        page = tmp_path / "a.html"
        page.unlink(missing_ok=True)
        assert bench(["--load", str(tmp_path / "a.json"), "--html", str(page)]) == 0
        tags = Tags()
        tags.feed(page.read_text(encoding="utf-8"))
        found.append(tags.found)
    assert all(each == found[0] for each in found) and len(found[0]) > 100
    assert not {"script", "iframe", "object", "a", "form"} & {tag for tag, _ in found[0]}


def test_names_are_not_formulas() -> None:
    """Only the numbers at logarithmic axes, such as 10², are formulas."""
    from matplotlib.text import Text

    from dit_bench.show.plots import drawn, latency_figure, ratio_figure

    report = made_up.report()
    for row in report["rows"]:
        row |= {"ratio": made_up.ratio(1.0), "verdict": "as quick"}
    text = json.dumps(report)
    name = json.dumps("x$\\frac$ $$ \x1b[31m\n</svg><script>")
    for each in ("S/8", "a processor", "eager bf16"):
        text = text.replace(json.dumps(each), name)
    for make in (ratio_figure, latency_figure):
        figure = make(json.loads(text))
        assert figure is not None, make
        ElementTree.fromstring(drawn(figure, "svg").decode())
        texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
        shown = [text for text in texts if "$" in text.get_text()]
        named = [text for text in shown if not text.get_text().startswith("$\\mathdefault{")]
        assert named and not any(text.get_parse_math() for text in named)
        numbers = [text for text in shown if text not in named]
        assert not numbers or any(text.get_parse_math() for text in numbers)
    assert numbers


def test_a_log_is_a_table_of_few_numbers(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss,$\\frac$\n10,1,2\n20,x,3\n30,1\n40,2,1\n5e1,2,2\n60,1,1\nnan,1,1\n")
    drop_rows_after(log, 50)
    assert log.read_text() == "step,loss,$\\frac$\n10,1,2\n40,2,1\n5e1,2,2\n"
    plot_losses(log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    log.write_text(f"step{',a' * 100_000}\n1{',1' * 100_000}\n")
    with pytest.raises(ValueError, match=r"log.csv is not a log of a training: remove it"):
        drop_rows_after(log, 50)
