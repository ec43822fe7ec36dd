"""Which backends there are: our own by name, others' by entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from tiny import tiny_dit, tiny_engine

from dit_engine import backends
from dit_engine.backends import Backend, create_backend, known_backends, resolve_backend
from dit_engine.engine import Engine
from dit_engine.runtime import parse_device

CPU = torch.device("cpu")


class Remote(Backend):
    def __init__(self, model, precision, device, address: str = "none") -> None:
        self.address, self.device = address, device


class PrepareOnly:
    """As other packages may write theirs: not derived from `Backend`."""

    __slots__ = ("prepare",)

    def __init__(self, model, precision, device) -> None:
        self.prepare = create_backend("eager", model, precision, device).prepare


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that another package has registered."""
    points = [
        EntryPoint(name, f"{__name__}:{kind}", backends.ENTRY_POINTS)
        for name, kind in (("plain", "PrepareOnly"), ("remote", "Remote"))
    ]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "dit_engine.backends"
        return [point for point in points if name in (None, point.name)]

    monkeypatch.setattr(backends, "entry_points", entry_points)


@pytest.mark.usefixtures("remote")
def test_an_entry_point_adds_a_backend_which_may_take_an_address() -> None:
    assert known_backends() == ("auto", "eager", "compile", "lean", "plain", "remote")
    assert resolve_backend("auto") == "lean"
    model = tiny_dit()
    assert create_backend("remote", model, "fp32", CPU).address == "none"
    assert create_backend("remote://host:80", model, "fp32", CPU).address == "host:80"
    with pytest.raises(ValueError, match=r"^backend 'eager://host': eager takes no address$"):
        create_backend("eager://host", model, "fp32", CPU)
    with pytest.raises(ValueError, match=r"'magic' is unknown; choose one of auto, .*, remote$"):
        resolve_backend("magic")


def test_devices_and_an_engine_stays_on_the_gpu_that_was_current_when_it_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(None) == CPU == parse_device("cpu")
    for name in ("foo", "cuda", "meta", "", "cpu:1", 0):
        with pytest.raises(ValueError, match=rf"^device '{name}' is not available; allowed: cpu"):
            parse_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for name in (None, "cuda", torch.device("cuda"), "cuda:2"):
        assert parse_device(name) == torch.device("cuda", 2)
    with pytest.raises(ValueError, match=r"'cuda:3' .* cpu, cuda, (.*, )?cuda:0, cuda:1, cuda:2$"):
        parse_device("cuda:3")
    engine = Engine(tiny_dit(), device="cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # as after set_device(0)
    assert engine.device == torch.device("cuda", 2)


@pytest.mark.usefixtures("remote")
def test_a_backend_that_only_prepares_makes_the_same_images_as_one_with_the_defaults() -> None:
    engine, options = tiny_engine(), {"steps": 2, "seed": 1, "output": "pt"}
    made, expected = (engine.generate([1], backend=b, **options) for b in ("plain", "eager"))
    assert torch.equal(made.images, expected.images)


@pytest.mark.slow
def test_every_batch_size_is_compiled_for_its_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than torch compiles a function for, in two engines; a second call compiles
    nothing."""
    compiler, graphs = torch.compile, list[torch.fx.GraphModule]()

    def counted(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counted, **how))
    batches = range(1, 4)
    generator = torch.Generator().manual_seed(0)
    timesteps, x = torch.tensor([999, 20]), torch.randn(99, 4, 8, 8, generator=generator)
    for seed in (0, 1):
        model = tiny_dit(seed, depth=1)
        made = create_backend("compile", model, "fp32", CPU)
        for batch in (*batches, *batches):
            labels = torch.arange(batch) % 10
            # Not with monkeypatch, which would delete the setting from torch's config afterwards.
            with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=2):
                found = made.prepare(labels, timesteps)(x[:batch], 1)
                expected = model(x[:batch], timesteps[1].expand(batch), labels)
            torch.testing.assert_close(found, expected)
    assert len(graphs) == 2 * len(batches)
    values = [n.meta.get("example_value") for g in graphs for n in g.graph.nodes]
    sizes = [size for v in values if isinstance(v, torch.Tensor) for size in v.shape]
    assert sizes and {type(size) for size in sizes} == {int}  # and no symbols
