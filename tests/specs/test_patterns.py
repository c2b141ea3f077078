"""Patterns of specs go along when modules have other names."""

import pytest

import peftc

NAMES = {"a.q": "b.query", "a.v": "b.value"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (peftc.LoKrConfig(r=4, rank_pattern={"q": 2}, alpha_pattern={"v": 3}), {"rank_pattern": 2, "alpha_pattern": 3}),
        (peftc.C3AConfig(block_size_pattern={"a.v": 8}), {"block_size_pattern": 8}),
        (peftc.DeloraConfig(lambda_pattern={"q": 7}, rank_pattern={"v": 1}), {"lambda_pattern": 7, "rank_pattern": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_they_are_for_the_new_names(spec: peftc.AdapterSpec, expected: dict[str, int]) -> None:
    assert not spec.model_copy(update={"target_modules": ("q", "v")}).goes_by_plain_names
    new = spec.respelled(NAMES)
    assert new.target_modules == ("b.query", "b.value")
    for field, number in expected.items():
        assert list(getattr(new, field).values()) == [number]
        assert set(getattr(new, field)) < {r"b\.query", r"b\.value"}


def test_layers_are_said_by_their_names_then() -> None:
    spec = peftc.OFTConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=["layers"])
    assert not spec.goes_by_plain_names
    new = spec.respelled(NAMES)
    assert new.layers_to_transform is None
    assert new.layers_pattern is None
