"""Walks through nested dicts, lists and tuples of tensors."""

import torch

from runtime.tensors import first_difference, map_tensors, named_tensors

NESTED = {
    "model": {"weight": torch.ones(2)},
    "optimizer": {"state": {0: {"step": torch.zeros(()), "lr": 0.1}}, "groups": [{"params": [0]}]},
    "pair": (torch.arange(3), "text"),
    "none": None,
}


def test_tensors_are_named_by_their_place() -> None:
    assert [name for name, _ in named_tensors(NESTED)] == ["model.weight", "optimizer.state.0.step", "pair[0]"]
    assert dict(named_tensors(NESTED))["pair[0]"] is NESTED["pair"][0]
    assert list(named_tensors(torch.ones(1))) == [("", torch.ones(1))]
    assert list(named_tensors({"a": 1, "b": []})) == []


def test_map_replaces_tensors_and_keeps_the_rest_and_the_types() -> None:
    mapped = map_tensors(NESTED, lambda name, tensor: f"{name}: {tuple(tensor.shape)}")
    assert mapped == {
        "model": {"weight": "model.weight: (2,)"},
        "optimizer": {"state": {0: {"step": "optimizer.state.0.step: ()", "lr": 0.1}}, "groups": [{"params": [0]}]},
        "pair": ("pair[0]: (3,)", "text"),
        "none": None,
    }


def test_map_leaves_the_original_as_it_is() -> None:
    nested = {"list": [torch.ones(1)]}
    mapped = map_tensors(nested, lambda _, tensor: tensor + 1)
    assert mapped["list"][0] == 2
    assert nested["list"][0] == 1
    assert mapped["list"] is not nested["list"]


def test_first_difference_of_weights_is_named() -> None:
    expected = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    assert first_difference({**expected}, expected) == ""
    assert first_difference({"a": torch.ones(2, 3)}, expected) == "b is not in the file"
    assert first_difference({**expected, "c": torch.ones(1)}, expected) == "c is only in the file"
    wrong = "a has the shape (2,) in the file, not (2, 3)"
    assert first_difference({"a": torch.ones(2), "b": torch.ones(1)}, expected) == wrong
    assert first_difference([torch.ones(2)], expected) == "a list in place of weights by name"
