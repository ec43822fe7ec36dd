"""Counts the operators and kernels that a piece of work launches, on any device, also on meta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Launches(TorchDispatchMode):
    """Counts, while it is entered, torch's operators that are neither a view nor an allocation.
    Stand-ins for Triton kernels add themselves with `counted`.

    Attributes:
        inside: name → number of launches within `within_a_graph`. outside: the same for all others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = Counter[str](), Counter[str]()
        self._now = self.outside

    @contextmanager
    def within_a_graph(self) -> Iterator[None]:
        before, self._now = self._now, self.inside
        try:
            yield
        finally:
            self._now = before

    def counted(self, name: str) -> None:
        self._now[name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        with self:  # an operator that is composed of others is counted as those
            results = func.decompose(*args, **(kwargs or {}))
        if results is not NotImplemented:
            return results
        results = func(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in ((args, kwargs), results)
        )
        schema = func._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        name = schema.name.removeprefix("aten::")
        if writes or (not made <= given and "empty" not in name):
            self.counted(name)
        return results
