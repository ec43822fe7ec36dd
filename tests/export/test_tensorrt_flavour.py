"""Which TensorRT is there, and that a package which aborts or hangs cannot harm this process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dit_engine.errors import BackendUnavailable
from dit_export.tensorrt import cuda_devices
from dit_export.tensorrt import flavour as tensorrt_flavour
from dit_export.tensorrt.flavour import choose_flavour, probe_import


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


def test_standard_one_is_preferred_and_not_imported_by_looking(package):
    package("__version__ = '10.13.2.6'")
    chosen = choose_flavour()
    assert (chosen.name, chosen.version) == ("tensorrt", "10.13.2.6")
    assert chosen.has_timing_cache and not chosen.builds_without_gpu
    assert "tensorrt" not in sys.modules
    assert str(chosen) == "TensorRT 10.13.2.6"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "ended with signal 6"),
        ("import os; os._exit(3)", "exit code 3"),
        ("raise OSError('libnvinfer.so.11: not found')", "libnvinfer.so.11: not found"),
        ("__version__ = '8.6.1'", "tensorrt 8.6.1 is too old: 10 is needed"),
    ],
)
def test_package_that_fails_is_an_error_of_one_line(package, code: str, reason: str):
    package(code)
    with pytest.raises(ImportError, match=reason) as caught:
        choose_flavour("tensorrt")
    assert "\n" not in str(caught.value)


def test_package_that_hangs_is_given_up(package, monkeypatch: pytest.MonkeyPatch):
    package("import time; time.sleep(60)")
    monkeypatch.setattr(tensorrt_flavour, "PROBE_SECONDS", 0.3)
    with pytest.raises(ImportError, match=r"tensorrt cannot be imported: no answer within 0\.3 s"):
        choose_flavour("tensorrt")


def test_an_answer_is_kept_for_the_process(package):
    package("__version__ = '11.0'")
    assert choose_flavour().version == "11.0"
    package("import os; os.abort()")
    assert choose_flavour().version == "11.0"


def test_auto_goes_on_to_the_next_one(package):
    pytest.importorskip("tensorrt_rtx")
    package("import os; os.abort()")
    assert choose_flavour().name == "rtx"


@pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt-rtx")])
def test_missing_package_names_its_extra(flavour: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorrt_flavour.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"pip install 'dit-engine\[{extra}\]'"):
        choose_flavour(flavour)
    with pytest.raises(ImportError, match=r"tensorrt is not installed.*tensorrt_rtx is not"):
        choose_flavour()


def test_unknown_flavour():
    with pytest.raises(ValueError, match="flavour 'trt': choose one of auto, tensorrt, rtx"):
        choose_flavour("trt")


def test_no_driver_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch):
    absent = ((), "libcuda.so.1 is not found")
    monkeypatch.setattr(cuda_devices, "cuda_devices", lambda: absent)
    with pytest.raises(BackendUnavailable) as caught:
        cuda_devices.require_device()
    assert str(caught.value) == (
        "TensorRT needs an NVIDIA GPU and its driver: libcuda.so.1 is not found"
    )


def test_device_number_is_checked(monkeypatch: pytest.MonkeyPatch):
    gpu = cuda_devices.CudaDevice("NVIDIA H200", "9.0")
    monkeypatch.setattr(cuda_devices, "cuda_devices", lambda: ((gpu,), ""))
    assert cuda_devices.require_device(0) is gpu
    with pytest.raises(BackendUnavailable, match="no GPU 1; there are 1"):
        cuda_devices.require_device(1)


def test_the_driver_is_asked_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A driver that cannot be loaded: the answer is a reason, whatever this machine has.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "libcuda.so.1").write_text("no library")
    cuda_devices.cuda_devices.cache_clear()
    try:
        assert cuda_devices.cuda_devices() == ((), "libcuda.so.1 is not found")
    finally:
        cuda_devices.cuda_devices.cache_clear()
