"""Which TensorRT and GPUs are here; a package that aborts or hangs cannot harm this process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dit_engine.errors import BackendUnavailable
from dit_export.tensorrt import installed
from dit_export.tensorrt.installed import choose_flavour, probe_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a package "tensorrt" of the given code, here and in child processes."""

    def make(code: str) -> None:
        (tmp_path / "tensorrt.py").write_text(code)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe_import.cache_clear()
    yield make
    probe_import.cache_clear()
    sys.modules.pop("tensorrt", None)


def test_the_standard_one_is_preferred_and_asked_once_in_another_process(package):
    package("__version__ = '10.13.2.6'")
    chosen = choose_flavour()
    assert (chosen.name, chosen.version, str(chosen)) == (
        "tensorrt", "10.13.2.6", "TensorRT 10.13.2.6",
    )  # fmt: skip
    assert not chosen.builds_without_gpu and "tensorrt" not in sys.modules
    package("import os; os.abort()")
    assert choose_flavour() == chosen


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "ended with signal 6"),
        ("import os; os._exit(3)", "exit code 3"),
        ("raise OSError('libnvinfer.so.11: not found')", "libnvinfer.so.11: not found"),
        ("__version__ = '8.6.1'", "tensorrt 8.6.1 is too old: 10 is needed"),
        ("import time; time.sleep(60)", r"cannot be imported: no answer within 0\.5 s"),
    ],
)
def test_a_package_that_fails_is_an_error_of_one_line(
    package, code: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    if "sleep" in code:
        monkeypatch.setattr(installed, "PROBE_SECONDS", 0.5)
    package(code)
    with pytest.raises(ImportError, match=reason) as caught:
        choose_flavour("tensorrt")
    assert "\n" not in str(caught.value)
    if "abort" in code and importlib.util.find_spec("tensorrt_rtx"):
        assert choose_flavour().name == "rtx"  # "auto" goes on to the next one


def test_missing_packages_name_their_extras(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    for flavour, extra in (("tensorrt", "tensorrt"), ("rtx", "tensorrt-rtx")):
        with pytest.raises(ImportError, match=rf"pip install 'dit-engine\[{extra}\]'"):
            choose_flavour(flavour)
    with pytest.raises(ImportError, match=r"tensorrt is not installed.*tensorrt_rtx is not"):
        choose_flavour()
    with pytest.raises(ValueError, match="flavour 'trt': choose one of auto, tensorrt, rtx"):
        choose_flavour("trt")


def test_the_driver_is_asked_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A driver that cannot be loaded: the answer is a reason, whatever this machine has."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "libcuda.so.1").write_text("no library")
    installed.cuda_devices.cache_clear()
    try:
        with pytest.raises(BackendUnavailable) as caught:
            installed.require_device()
    finally:
        installed.cuda_devices.cache_clear()
    assert str(caught.value) == (
        "TensorRT needs an NVIDIA GPU and its driver: libcuda.so.1 is not found"
    )
    gpu = installed.CudaDevice("NVIDIA H200", "9.0")
    monkeypatch.setattr(installed, "cuda_devices", lambda: ((gpu,), ""))
    assert installed.require_device(0) is gpu
    with pytest.raises(BackendUnavailable, match="no GPU 1; there are 1"):
        installed.require_device(1)
