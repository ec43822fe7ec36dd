"""Devices as people name them."""

from __future__ import annotations

import pytest
import torch

from dit_engine.runtime import parse_device


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu") == torch.device("cpu") == parse_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(None) == torch.device("cpu")
    for name in ("foo", "cuda", "meta", "cuda:x", "", "cpu:1", 0):
        with pytest.raises(ValueError, match=rf"^device '{name}' is not available; allowed: cpu"):
            parse_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in (None, "cuda", "cuda:1", torch.device("cuda")):
        assert parse_device(name) == torch.device("cuda", 1)
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"device 'cuda:2' .* cpu, cuda, (.*, )?cuda:0, cuda:1$"):
        parse_device("cuda:2")
