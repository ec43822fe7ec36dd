"""Optimisation profiles: how they are written, what they hold, which one is taken."""

from __future__ import annotations

import pytest

from dit_export.tensorrt.profiles import Profile, Range, choose_profile, parse_profiles


def test_range_is_one_number_or_three():
    assert Range.parse("1,2,8") == Range(1, 2, 8)
    assert Range.parse("4") == Range(4, 4, 4)
    assert 8 in Range(1, 2, 8) and 0 not in Range(1, 2, 8) and 9 not in Range(1, 2, 8)


@pytest.mark.parametrize("text", ["", "1,8", "1,2,3,4", "a,b,c", "1.5", "0,1,2", "2,1,8", "1,9,8"])
def test_bad_range_is_named(text: str):
    with pytest.raises(ValueError, match="batch ") as caught:
        parse_profiles([text])
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_profile_twice_is_refused():
    with pytest.raises(ValueError, match="given twice"):
        parse_profiles(["1,2,8", "1,2,8"])
    with pytest.raises(ValueError, match="at least one"):
        parse_profiles([])


def test_shapes_of_fixed_and_free_sizes():
    (fixed,) = parse_profiles(["1,2,8"])
    assert fixed.shapes((-1, 4, 16, 16)) == ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16))
    assert fixed.shapes((-1,)) == ((1,), (2,), (8,))
    (free,) = parse_profiles(["1,2,8"], "8,32,64")
    assert free.shapes((-1, 4, -1, -1)) == ((1, 4, 8, 8), (2, 4, 32, 32), (8, 4, 64, 64))
    with pytest.raises(ValueError, match="needs a profile with a size"):
        fixed.shapes((-1, 4, -1, -1))


def test_the_narrowest_profile_that_holds_is_taken():
    profiles = parse_profiles(["1,2,64", "1,1,2", "16,32,64"])
    assert [choose_profile(profiles, n) for n in (1, 2, 3, 16, 64)] == [1, 1, 0, 2, 2]


def test_batch_outside_names_the_profiles():
    with pytest.raises(ValueError, match="outside") as caught:
        choose_profile(parse_profiles(["1,2,8", "16"]), 9)
    assert str(caught.value) == (
        "batch 9 is outside the engine's profile: batch 1 to 8 (best at 2); batch 16"
    )


def test_size_outside_is_refused_too():
    profiles = parse_profiles(["1,2,8"], "8,32,64")
    assert choose_profile(profiles, 2, (8, 64)) == 0
    with pytest.raises(ValueError, match=r"batch 2 of 8×65 is outside .* size 8 to 64"):
        choose_profile(profiles, 2, (8, 65))


def test_profiles_survive_json():
    for profile in parse_profiles(["1,2,8"], "8,32,64") + parse_profiles(["3"]):
        assert Profile.from_dict(profile.to_dict()) == profile
