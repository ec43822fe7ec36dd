"""Images that are saved from Python tell how to make them again, as those of dit-generate do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_engine

SETTINGS = ("steps", "sampler", "spacing", "eta", "guidance_scale", "precision",
            "guidance_channels", "guidance_interval", "noise")  # fmt: skip


def record_of(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["dit_engine"])


def test_one_image_by_itself(tmp_path: Path) -> None:
    engine = tiny_engine()
    result = engine.generate(["cat", 7], steps=2, guidance_scale=[2.0, 3.0], seed=4)
    result.images[1].save(tmp_path / "a.png")
    engine.generate(7, steps=2, guidance_scale=3.0, seed=5).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        record = record_of(tmp_path / name)
        assert (record["label"], record["label_name"], record["seed"]) == (7, "hen", 5)
        settings = {key: record[key] for key in SETTINGS}
        again = engine.generate(record["label"], seed=record["seed"], output="np", **settings)
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(np.asarray(image), again.images[0])
            assert image.text["sampler"] == "ddpm"


def test_several_images(tmp_path: Path) -> None:
    result = tiny_engine().generate(["cat", 7], steps=2, seed=4)
    result.save(tmp_path / "sheet.png")
    assert record_of(tmp_path / "sheet.png")["seeds"] == [4, 5]
    result.save(tmp_path / "new" / "images")
    files = sorted((tmp_path / "new" / "images").iterdir())
    assert [file.name for file in files] == ["00000-cat-seed4.png", "00001-hen-seed5.png"]
    assert [record_of(file)["seed"] for file in files] == [4, 5]
    with pytest.raises(ValueError, match="only images of output 'pil' are saved"):
        tiny_engine().generate(1, steps=1, output="np").save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"\.jpg files are not written"):
        result.save(tmp_path / "c.jpg")
    with pytest.warns(UserWarning, match="images holds 2 of these images, which will be replaced"):
        result.save(tmp_path / "new" / "images")
