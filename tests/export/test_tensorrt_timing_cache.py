"""Timings that are kept between builds, with the caches of TensorRT for RTX itself.

TensorRT for RTX times nothing while it builds, but makes, sets and serialises caches like the
standard TensorRT, of which alone the builder asks them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit_export.tensorrt.network import attach_timing_cache, save_timing_cache
from dit_export.tensorrt.reports import process_logger

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Watched:
    """A builder's config that notes what caches are made of."""

    def __init__(self) -> None:
        self.builder = trt.Builder(process_logger(trt))
        self.config = self.builder.create_builder_config()
        self.made_of: list[bytes] = []

    def create_timing_cache(self, content: bytes) -> Any:
        self.made_of.append(content)
        return self.config.create_timing_cache(content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return self.config.set_timing_cache(cache, ignore_mismatch)

    def get_timing_cache(self) -> Any:
        return self.config.get_timing_cache()


def test_a_cache_is_written_and_used_again(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "timing.cache"
    first, second = Watched(), Watched()
    attach_timing_cache(first, path)
    assert first.made_of == [b""] and not path.exists()
    save_timing_cache(first, path)
    written = path.read_bytes()
    assert len(written) > 0 and [p.name for p in path.parent.iterdir()] == ["timing.cache"]
    attach_timing_cache(second, path)
    assert second.made_of == [written]
    assert bytes(second.get_timing_cache().serialize()) == written


def test_a_config_without_a_cache_writes_none(tmp_path: Path) -> None:
    config = trt.Builder(process_logger(trt)).create_builder_config()
    assert config.get_timing_cache() is None
    save_timing_cache(config, tmp_path / "timing.cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", [b"", b"garbage", b"\xff" * 10_000])
def test_a_damaged_cache_stops_no_build(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(damaged)
    watched = Watched()
    attach_timing_cache(watched, path)
    save_timing_cache(watched, path)
    again = Watched()
    attach_timing_cache(again, path)
    assert again.get_timing_cache() is not None and path.read_bytes() != damaged


@pytest.mark.parametrize("refused", ["create", "set"])
def test_a_cache_that_tensorrt_refuses_gives_way_to_an_empty_one(
    tmp_path: Path, refused: str
) -> None:
    path, kept = tmp_path / "timing.cache", []
    path.write_bytes(b"of another version")

    def create(content: bytes) -> SimpleNamespace | None:
        return None if content and refused == "create" else SimpleNamespace(content=content)

    def set_cache(cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and refused == "set":
            return False
        kept.append(cache.content)
        return True

    attach_timing_cache(
        SimpleNamespace(create_timing_cache=create, set_timing_cache=set_cache), path
    )
    assert kept == [b""]
