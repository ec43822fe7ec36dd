"""The earlier name of `dit_export.backends.server`, which installations made before name."""

from dit_export.backends.server import TritonBackend  # noqa: F401
