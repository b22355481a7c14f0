"""Which mask belongs to which photograph, by their names alone."""

import random
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.pairing import match_names, separate

NUMBERS = range(1, 13)
CLASSES = [f"{animal}/{number:03}" for animal in ("frog", "owl") for number in range(6)]


def named(pattern: str) -> list[str]:
    return [pattern.format(number) for number in NUMBERS]


def nfd(names: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFD", name) for name in names]


@pytest.mark.parametrize(
    ("images", "masks", "rule"),
    [
        (named("a{}"), named("a{}"), None),
        (named("a{}"), named("a{}_mask"), "all 12 masks end in _mask; paired by the rest"),
        (named("a{}"), named("a{}-mask"), "all 12 masks end in -mask"),
        (named("a{}"), named("a{}.mask"), "all 12 masks end in .mask"),
        (named("a{}"), named("a{}_GT"), "all 12 masks end in _GT"),
        (named("a{}"), named("mask_a{}"), "all 12 masks begin with mask_"),
        (named("ISIC_{:07}"), named("ISIC_{:07}_segmentation"), "all 12 masks end in _segmentation"),
        (named("a{}"), named("a{}_final"), "all 12 masks end in _final"),
        (named("a{}"), named("a{}.jpg"), "12 pairs differ in a second ending, such as a1 and a1.jpg"),
        (named("a{}"), named("a{}.JPG.png"), "12 pairs differ in a second ending"),
        (named("a{}"), named("a{}.jpg_mask"), "all 12 masks end in .jpg_mask"),
        (named("{}"), named("{:04}"), "12 pairs differ in leading zeros, such as 1 and 0001"),
        (named("IMG_{:04}"), named("img_{}"), "12 pairs differ in leading zeros"),
        (named("IMG_{}"), named("img_{}"), "12 pairs differ in letter case, such as IMG_1 and img_1"),
        (named("IMG_{:04}"), named("img_{}_Mask"), "all 12 masks end in _Mask"),
        (
            nfd(named("caméléon_{}")),
            named("caméléon_{}"),
            "12 pairs differ in how their accents are encoded (NFC, NFD)",
        ),
        (nfd(named("Chamäleon_{}")), named("chamäleon_{}"), "12 pairs differ in letter case"),
        (named("{}_sat"), named("{}_mask"), "images are named ..._sat and all 12 masks ..._mask; paired by the rest"),
        (named("img_{}"), named("mask_{}"), "images are named img_... and all 12 masks mask_..."),
        (named("image{}"), named("mask{:03}"), "images are named image... and all 12 masks mask..."),
        (named("{}_training"), named("{}_manual1"), "images are named ..._training"),
        (named("photo_{}"), named("{}"), "images are named photo_..."),
        (CLASSES, CLASSES, None),
        (CLASSES, [f"{name}_mask" for name in CLASSES], "all 12 masks end in _mask"),
        ([name.title() for name in CLASSES], CLASSES, "12 pairs differ in letter case"),
        (CLASSES, [name.replace("/", "_masks/") for name in CLASSES], "words for images and masks"),
        (named("a{}"), [f"{'x' if number < 6 else 'y'}/a{number}" for number in NUMBERS], "differ in sub-folder"),
        ([f"{'x' if number < 6 else 'y'}/a{number}" for number in NUMBERS], named("a{}"), "differ in sub-folder"),
        (named("a{}"), [*named("a{}_mask"), *named("a{}_edge")], "12 of 24 masks end in _mask"),
        (named("a{}"), [*named("a{}_mask")[:6], *named("a{}")[6:]], "6 of 12 masks end in _mask"),
        ([*named("a{}"), "odd"], [*named("a{}_mask"), "strange"], "12 of 13 masks end in _mask"),
    ],
)
def test_names_that_differ_one_to_one_are_paired_and_the_rule_is_named(
    images: list[str], masks: list[str], rule: str | None
) -> None:
    """The order of the names does not matter."""
    expected = dict(zip(images, masks, strict=False))
    expected = {image: mask for image, mask in expected.items() if image != "odd"}
    for seed in range(3):
        mixed = random.Random(seed).sample(images, len(images)), random.Random(seed + 9).sample(masks, len(masks))
        matching = match_names(*mixed)
        assert matching.partners == expected
        assert list(matching.partners) == [image for image in mixed[0] if image in expected]
        assert len(matching.rules) == (rule is not None)
        examples = rule is not None and "such as" in rule  # the first that comes
        if rule and not examples:
            assert rule in matching.rules[0]
    if rule:
        assert rule in match_names(images, masks).rules[0]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (named("a{}"), named("a{}_edge")),  # the object's outline, not its mask
        (named("train_{}"), named("test_{}")),  # of other photographs
        (named("{}"), named("test_{}")),
        (named("IMG_{}"), named("DSC_{}")),
        (named("{}")[:9], named("1{}")[:9]),  # 1 and 11
        (named("IMG_{}"), ["moth", "owl", "frog"]),
        (["7", "07"], ["007", "0007"]),
        (named("a{}"), [*named("a{}_mask"), *named("a{}_gt")]),  # which?
        (CLASSES, [f"{number:03}" for number in range(6)]),  # two photographs for each mask
        (["moth"], ["moths"]),
        (["a"], ["b"]),
    ],
)
def test_names_that_could_be_anything_are_not_paired(images: list[str], masks: list[str]) -> None:
    matching = match_names(images, masks)
    assert (matching.partners, matching.rules) == ({}, ())
    assert matching.hint


def test_several_masks_of_a_photograph_are_named_and_none_is_chosen() -> None:
    matching = match_names(["a", "b"], ["a_1", "a_2", "b_1", "b_2"])
    assert matching.partners == {}
    assert matching.hint == "2 images have several masks (a: a_1, a_2), and one each is needed"
    matching = match_names(named("a{}"), [*named("a{}_mask_1"), "a1_mask_2"])
    assert "a1" not in matching.partners
    assert "(a1: a1_mask_1, a1_mask_2)" in matching.hint


def test_names_with_partners_of_equal_name_keep_them() -> None:
    """Even if another rule would fit: what was read before rules existed is read as before."""
    matching = match_names(["a", "A", "lone_image"], ["a", "A", "a_mask", "lone_mask"])
    assert matching.partners == {"a": "a", "A": "A"}
    assert (matching.rules, matching.hint) == ((), "")


@given(
    names=st.sets(st.text(st.sampled_from("abAB01_-.é"), min_size=1, max_size=5), max_size=12),
    others=st.sets(st.text(st.sampled_from("abAB01_-.é"), min_size=1, max_size=9), max_size=12),
)
def test_pairs_are_one_to_one_and_contain_all_equal_names(names: set[str], others: set[str]) -> None:
    partners = match_names(sorted(names), sorted(others)).partners
    assert partners.keys() <= names
    assert set(partners.values()) <= others
    assert len(set(partners.values())) == len(partners)
    assert all(partners[name] == name for name in names & others)


@pytest.mark.parametrize(
    ("files", "masks"),
    [
        (["a.jpg", "a_mask.png", "b.jpg", "b_mask.png"], ["a_mask.png", "b_mask.png"]),
        (["a.jpg", "b.jpg", "gt_a.jpg", "gt_b.jpg"], ["gt_a.jpg", "gt_b.jpg"]),
        (["1_sat.jpg", "1_mask.jpg", "2_sat.jpg", "2_mask.jpg"], ["1_mask.jpg", "2_mask.jpg"]),
        (["a.JPG", "a.png", "b.jpeg", "b.png"], ["a.png", "b.png"]),
        (["a.jpg", "b.jpg", "c.jpg"], None),
        (["a.jpg", "a_mask.png", "b.jpg", "z_mask.png"], None),
        (["a.jpg", "b.png", "c.jpg"], None),
        ([], None),
    ],
)
def test_photographs_and_masks_in_one_folder_are_separated(files: list[str], masks: list[str] | None) -> None:
    expected = None if masks is None else ([file for file in files if file not in masks], masks)
    assert separate(files) == expected
