"""Where torch's compiler keeps what it made: in our cache, in the place of the temporary directory.

There its name can be guessed, so that another user may have made it; and what it holds is
unpickled, included in kernels, and run.
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

from dit_engine.caches import private_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_INDUCTOR = "torch._inductor"


def use_private_cache() -> None:
    """Call this before torch compiles anything; a directory that the user has chosen stays.

    torch reads the variable whenever it compiles, and sets it to its usual place as soon as the
    compiler is imported. Precompiled headers lie in the usual place whatever the variable says, so
    that the usual place becomes another one too.
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
        codecache._precompile_header.cache_clear()  # it remembers paths


def _directory() -> str:
    try:
        return str(private_cache("inductor"))
    except (OSError, ValueError) as error:
        warnings.warn(f"what torch compiles is kept for this process alone: {error}", stacklevel=2)
        return _temporary()


@functools.cache
def _temporary() -> str:
    directory = tempfile.mkdtemp(prefix="dit-engine-inductor-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
