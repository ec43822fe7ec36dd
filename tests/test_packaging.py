"""What gets installed: metadata, pins, and the contents of the wheel and of the source archive."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_structure import PARTS, ROOT

from dit_engine import __version__

NOT_BUILT = "libdit_kernels_cpu.txt"
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def copied(folder: Path, *names: str) -> Path:
    """The files and folders of the sources, without what was built in them, in ``folder``."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", NOT_BUILT, "*.egg-info")
    for name in (*FILES, *names):
        target = folder / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return folder


def build(kind: str, source: Path, out: Path) -> tuple[Path, str]:
    """The "wheel" or "sdist" that the installed setuptools builds from ``source``, without network,
    and what the build said on standard error."""
    script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir()
    command = [sys.executable, "-c", script, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the Python sources alone, as where the native kernels cannot be built."""
    folder = tmp_path_factory.mktemp("build")
    path, said = build("wheel", copied(folder / "source", *PARTS.values()), folder / "wheel")
    assert re.search(r"^NOT building the native CPU kernels: \w", said, re.MULTILINE)
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def run_installed(code: str, folder: Path) -> dict[str, Any]:
    """Run code in a fresh interpreter with ``folder`` in front; it prints one JSON object."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_metadata(wheel: Path, metadata: Message) -> None:
    assert wheel.name == f"dit_engine-{__version__}-py3-none-any.whl"
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    base = {canonicalize_name(r.name) for r in requirements(metadata) if r.marker is None}
    assert base == {"torch", "numpy", "safetensors", "pillow", "huggingface-hub", "tqdm"}

    def of_extra(extra: str) -> set[str]:
        environment = {"extra": extra, "python_version": "3.12"}
        found = [r for r in requirements(metadata) if r.marker and r.marker.evaluate(environment)]
        return {f"{canonicalize_name(r.name)}{r.specifier}" for r in found}

    for extra in ("train", "bench", "diffusers", "onnx"):
        assert of_extra(extra) and of_extra(extra) <= of_extra("test"), extra


def test_the_installed_version_is_the_sources() -> None:
    try:
        installed = importlib.metadata.version("dit-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dit-engine is on the path but not installed")
    assert installed == __version__, "stale installation: pip install -e ."


def test_the_wheel_holds_all_parts_and_imports_on_its_own(wheel: Path, tmp_path: Path) -> None:
    expected = {f"dit_kernels/cpu/{NOT_BUILT}"}
    for part, folder in PARTS.items():
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        named = ("py.typed", "repository_readme.md")
        files = [p for p in files if p.suffix in (".py", ".h") or p.name in named]
        expected |= {f"{part}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
        assert f"{part}/py.typed" in expected
    builtin = [p for p in (ROOT / "dit_engine/builtin").rglob("*") if p.is_file()]
    expected |= {p.relative_to(ROOT).as_posix() for p in builtin}
    assert len(builtin) >= 6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        assert {n for n in archive.namelist() if ".dist-info/" not in n} == expected
        weights = [i for i in archive.infolist() if i.filename.endswith(".safetensors")]
    assert sum(i.file_size for i in weights) <= 25e6  # the built-in model's limit, DiT and VAE
    code = f"""
import importlib, json, dit_engine, dit_kernels
parts = [importlib.import_module(name).__file__ for name in {[*PARTS]}]
print(json.dumps({{'files': parts, 'native': dit_kernels.available()['native']}}))
"""
    found = run_installed(code, tmp_path)
    why = (tmp_path / "dit_kernels" / "cpu" / NOT_BUILT).read_text().strip()
    assert found["native"] == (
        f"libdit_kernels_cpu.so was not built when this package was built: {why}"
    )
    assert [Path(file).parents[1] for file in found["files"]] == [tmp_path] * len(PARTS)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the native kernels need Linux on x86-64 and a C++ compiler",
)
def test_from_the_source_archive_to_an_installed_command(tmp_path: Path) -> None:
    """sdist → wheel with the native kernels → a fresh installation that makes an image."""
    names = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "constraints.txt",
             "constraints-server.txt", "CMakeLists.txt")  # fmt: skip
    folders = ("dit_engine", "kernels", "export", "benchmarks", "docs", "tests")
    source = copied(tmp_path / "source", *names, *folders)
    sdist, _ = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"dit_engine-{__version__}"
    assert not [name for name in (*FILES, *names) if not (unpacked / name).is_file()]
    for folder in ("docs", "kernels/csrc", "tests/data", "dit_engine/builtin"):
        files = {p.relative_to(source) for p in (source / folder).rglob("*") if p.is_file()}
        assert files and not [path for path in files if not (unpacked / path).is_file()]
    wheel, said = build("wheel", unpacked, tmp_path / "wheel")
    assert "NOT building" not in said
    assert wheel.name == f"dit_engine-{__version__}-py3-none-linux_x86_64.whl"
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
           "--disable-pip-version-check", "--target", str(installed), str(wheel)]  # fmt: skip
    subprocess.run(pip, check=True)
    assert not (installed / "dit_kernels/cpu" / NOT_BUILT).exists()
    code = """
import json, dit_engine, dit_kernels
from dit_engine.cli.generate import main
code = main(["--labels", "planets", "--steps", "2", "-o", "a.png", "--device", "cpu", "--quiet"])
print(json.dumps({"native": dit_kernels.available()["native"], "file": dit_engine.__file__,
                  "code": code}))
"""
    found = run_installed(code, installed)
    assert found["native"].startswith("yes") and found["code"] == 0
    assert Path(found["file"]).parents[1] == installed
    assert (installed / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_console_scripts_and_backends_resolve(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/entry_points.txt")]
        text = archive.read(name).decode()
    groups = configparser.ConfigParser(delimiters=("=",))
    groups.read_string(text)
    points = {
        group: {n: importlib.metadata.EntryPoint(n, v, group) for n, v in groups.items(group)}
        for group in groups.sections()
    }
    assert points.keys() == {"console_scripts", "dit_engine.backends"}
    assert points["dit_engine.backends"].keys() == {"onnxruntime", "tensorrt", "triton"}
    for backend in points["dit_engine.backends"].values():
        assert callable(backend.load())
    scripts = points["console_scripts"]
    assert scripts.keys() == {"dit-bench", "dit-export", "dit-generate", "dit-train"}
    for script in scripts.values():
        with pytest.raises(SystemExit) as stopped:
            script.load()(["--version"])
        assert stopped.value.code == 0


def test_constraints_pin_every_requirement_exactly(metadata: Message) -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and not re.search(r"^\s*-", text, re.MULTILINE)  # no index
    pins = [Requirement(x) for x in text.splitlines() if x and not x.startswith("#")]
    for requirement in requirements(metadata):
        for python in ("3.10", "3.11", "3.12", "3.13"):
            for extra in ("test", "lint"):
                environment = {"python_version": python, "extra": extra}
                if requirement.marker and not requirement.marker.evaluate(environment):
                    continue
                (pinned,) = (
                    pin.specifier
                    for pin in pins
                    if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
                    and (pin.marker is None or pin.marker.evaluate(environment))
                )
                assert str(pinned).startswith("==") and "*" not in str(pinned), requirement
                assert requirement.specifier.contains(str(pinned)[2:]), f"{requirement}: {pinned}"
