"""Keep the results of torch's compiler in our private cache, not in the temporary directory.

In the temporary directory the cache has a known name, so another user could make it first. Its
files are unpickled, included when kernels are compiled, and run.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import warnings
from importlib import import_module
from typing import Any

from dit_engine.io.caches import private_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_INDUCTOR = "torch._inductor"


def use_private_cache() -> None:
    """Set torch's cache directory; call this before torch compiles anything.

    A directory that the user chose with `VARIABLE` is kept. torch reads the variable whenever it
    compiles, and sets it to its default directory as soon as the compiler is imported. Precompiled
    headers go to the default directory whatever the variable says, so the default is changed too.
    """
    directory = _directory()
    loaded = sys.modules.get(f"{_INDUCTOR}.runtime.cache_dir_utils")
    usual = directory if loaded is None else loaded.default_cache_dir()
    if os.environ.get(VARIABLE, usual) == usual:
        os.environ[VARIABLE] = directory
    codecache: Any = import_module(f"{_INDUCTOR}.codecache")
    for name in ("cache_dir_utils", "runtime_utils"):
        module: Any = import_module(f"{_INDUCTOR}.runtime.{name}")
        module.default_cache_dir = codecache.default_cache_dir = lambda: directory
    headers = os.path.join(directory, "precompiled_headers")  # noqa: PTH118 (torch adds to it)
    if getattr(codecache, "_HEADER_DIR", headers) != headers:
        codecache._HEADER_DIR = headers
        codecache._HEADER_LOCK_DIR = os.path.join(headers, "locks")  # noqa: PTH118
        codecache._precompile_header.cache_clear()  # its results hold the old paths


def _directory() -> str:
    try:
        return str(private_cache("inductor"))
    except (OSError, ValueError) as error:
        warnings.warn(f"what torch compiles is kept only for this process: {error}", stacklevel=2)
        return _temporary()


@functools.cache
def _temporary() -> str:
    directory = tempfile.mkdtemp(prefix="dit-engine-inductor-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
