"""DiT Engine: exact and fast inference for Diffusion Transformers.

    from dit_engine import Engine

    engine = Engine.from_pretrained("builtin")  # or a path, or a hub id
    result = engine.generate(["planets", 3, 7], steps=50, guidance_scale=4.0, seed=0)
    result.images[0].save("planet.png")  # a list of PIL images

`help(Engine.generate)` has every option, `engine.label_names` the model's classes.
"""

from importlib import import_module

from dit_engine._version import __version__

TYPE_CHECKING = False  # not from typing: `python -m` could find that in the current directory
if TYPE_CHECKING:
    from typing import Any

    from dit_engine.checkpoint import load_model
    from dit_engine.config import ModelConfig
    from dit_engine.engine import Engine
    from dit_engine.errors import BackendUnavailable
    from dit_engine.results import Generation, Progress

__all__ = [
    "BackendUnavailable",
    "Engine",
    "Generation",
    "ModelConfig",
    "Progress",
    "__version__",
    "load_model",
]

# Importing the package stays free of torch, so that `--version` and `--help` answer at once.
_MODULES = {
    "BackendUnavailable": "errors",
    "Engine": "engine",
    "Generation": "results",
    "ModelConfig": "config",
    "Progress": "results",
    "load_model": "checkpoint",
}


def __getattr__(name: str) -> "Any":
    if name not in _MODULES:
        raise AttributeError(f"module 'dit_engine' has no attribute {name!r}")
    return getattr(import_module(f"dit_engine.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
