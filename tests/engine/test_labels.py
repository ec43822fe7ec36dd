"""Labels: names that several classes have, numerals, case, Unicode; whatever holds them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import NAMES, tiny_dit

from dit_engine import Engine
from dit_engine.labels import class_order, resolve_labels
from dit_engine.training.data import load_image_folder

BIRDS = ("crane, bird", "tench, Tinca tinca", "maillot", "maillot, tank suit", "crane, machine")
CASES = ("polish", "Polish", "REINDEER", "Café", "straße")
NUMERALS = ("0", "1", "10", "2", "77")  # as sorted text had them
MANY = [f"class {i}" for i in range(31)]


def resolved(label: Any, names: Sequence[str] | None) -> list[int]:
    return resolve_labels(label, len(names or NAMES), names)


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (NAMES, "Cat", 2),
        (BIRDS, "tinca  TINCA", 1),
        (CASES, "polish", 0),
        (CASES, "Polish", 1),
        (CASES, unicodedata.normalize("NFD", "CAFÉ"), 3),
        (tuple(unicodedata.normalize("NFD", name) for name in CASES), "café", 3),
        (CASES, "STRASSE", 4),
        (NUMERALS, "77", 4),  # no class has that number
        (NUMERALS, "4", 4),  # no class has that name
        (NUMERALS, "number:2", 2),
        (NAMES, np.array("dog"), 3),
    ],
)
def test_what_a_label_means(names: tuple[str, ...], label: object, expected: int) -> None:
    assert resolved(label, names) == [expected]


def test_labels_come_in_arrays_and_iterators() -> None:
    for many in (np.array([3, 5], np.uint8), np.array(["dog", "fox"]), (3, "5"), iter([3, 5])):
        assert resolved(many, NAMES) == [3, 5]


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (BIRDS, "crane", "label 'crane' is a name of classes 0 (crane, bird) and 4 (crane, "),
        (CASES, "POLISH", "classes 0 (polish) and 1 (Polish)"),
        (NUMERALS, "2", "label '2' is the name of class 3 and the number of class 2 (10): give"),
        (NAMES, "10", "label 10 is out of range; allowed are 0 to 9"),
        (NAMES, "Iibex", "label 'Iibex' is unknown; did you mean 'ibex'? allowed are ant, bee"),
        (NAMES, "9" * 5000, "is out of range; allowed are 0 to 9"),
        (NAMES, b"\x03", "label b'\\x03' is neither a name nor a whole number"),
        (NAMES, np.array([True]), "label True is neither"),
        (NAMES, np.array([[3, 5]]), "labels has shape (1, 2); one dimension is needed"),
        (NAMES, [], "labels is empty"),
        (MANY, "clas 30", "allowed are 31 names (see --list-labels)"),
        (None, "cat", "this model has no label names, use numbers 0 to 9"),
    ],
)
def test_what_is_refused(names: Sequence[str] | None, label: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        resolved(label, names)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("crane", "tench"), "label_names holds 2 for 3 classes"),
        ("abc", "label_names 'abc' is not a list of names"),
        (("a", "b", 3), "label_names holds 3, which is not a string"),
    ],
)
def test_an_engine_takes_one_name_per_class(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Engine(tiny_dit(num_classes=3), label_names=names)


def test_folders_named_by_numbers_are_in_their_order(tmp_path: Path) -> None:
    for name in ("10", "2", "0", "1", "other"):
        (tmp_path / name).mkdir()
        shade = 255 if name == "other" else 20 * int(name)
        Image.new("RGB", (4, 4), (shade,) * 3).save(tmp_path / name / "a.png")
    before = ("0", "1", "10", "2", "other")  # of a run that began when names were sorted as text
    for earlier, names, shades in (
        ((), ("0", "1", "2", "10", "other"), [0, 20, 40, 200, 255]),
        (before, before, [0, 20, 200, 40, 255]),
    ):
        read = load_image_folder(tmp_path, 4, earlier)
        assert read.class_names == names and read.images[:, 0, 0, 0].tolist() == shades
    assert class_order(["b", "007", "6", "a"]) == ["6", "007", "a", "b"]
