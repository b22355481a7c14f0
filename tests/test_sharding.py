"""Sharded ranks: the same run in a part of the memory, and checkpoints that any number of ranks can resume."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import differing_tensors
from launching import Launch, load, read_events
from safetensors.torch import save_file
from torch import nn

from runtime.sharding import (
    load_local_state,
    load_whole_state,
    local,
    local_state,
    split_like,
    whole_on_first,
    whole_weights,
)

WINDOWS = ("--accumulation-steps", "3", "--checkpoint-every", "1")


def require_same_curves(one: Launch, other: Launch) -> None:
    """Assert equal losses, IoUs and norms, within 1e-4 and 1e-3: sums over shards have another order."""
    assert one.applied().keys() == other.applied().keys()
    for number, loss in one.applied().items():
        assert loss == pytest.approx(other.applied()[number], abs=1e-4)
    for epoch, expected in zip(read_events(one.directory, "epoch"), read_events(other.directory, "epoch"), strict=True):
        assert epoch["iou"] == pytest.approx(expected["iou"], abs=1e-3)
        assert epoch["grad_norm_max"] == pytest.approx(expected["grad_norm_max"], rel=1e-3)


def shapes(nested: Any) -> Any:
    if isinstance(nested, dict):
        return {key: shapes(value) for key, value in nested.items()}
    if isinstance(nested, list):
        return [shapes(value) for value in nested]
    return tuple(nested.shape) if isinstance(nested, torch.Tensor) else None


@pytest.fixture(scope="session")
def sharded(odd_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    launch = Launch(odd_dataset, tmp_path_factory.mktemp("sharded"))
    code, _, err = launch.run(2, *WINDOWS, "--shard")
    assert code == 0, err
    return launch


@pytest.mark.slow
def test_sharded_ranks_have_the_losses_norms_and_scores_of_replicas(sharded: Launch, two_ranks: Launch) -> None:
    require_same_curves(sharded, two_ranks)


@pytest.mark.slow
def test_checkpoints_of_sharded_ranks_are_those_of_one_process(sharded: Launch, two_ranks: Launch) -> None:
    for name in ("epoch_0002.pth", "best_model.pth"):
        ours, theirs = load(sharded.directory / name), load(two_ranks.directory / name)
        assert shapes(ours) == shapes(theirs)
        for key, weight in ours["model"].items():
            torch.testing.assert_close(weight, theirs["model"][key], rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), [(1, ()), pytest.param(3, ("--shard",), marks=pytest.mark.slow)])
def test_sharded_run_resumes_unsharded_and_on_other_ranks(
    ranks: int, flags: tuple[str, ...], two_ranks: Launch, odd_dataset: Path, tmp_path: Path
) -> None:
    """Stop mid-epoch in stage 2, in which all weights train: moments that were only one shard's would show."""
    launch = Launch(odd_dataset, tmp_path)
    assert launch.run(2, *WINDOWS, "--shard", signal_at="0:4:SIGTERM")[0] != 0
    code, out, err = launch.run(ranks, *WINDOWS, "--resume", "auto", *(flags or ("--no-shard",)))
    assert code == 0, err
    assert "1 epochs and 2 windows done" in out
    require_same_curves(launch, two_ranks)


@pytest.mark.slow
def test_killed_sharded_run_ends_bitwise_the_same(sharded: Launch, odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    flags = (*WINDOWS, "--shard", "--resume", "auto")
    code, _, err = launch.run(2, *flags, launcher=("--max-restarts=1",), signal_at="1:4:SIGKILL")
    assert code == 0, err
    assert differing_tensors(launch.final(), sharded.final()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan-loss", "nan-weight", "bad-sample"])
def test_all_sharded_ranks_answer_a_fault_on_one_of_them_alike(kind: str, odd_dataset: Path, tmp_path: Path) -> None:
    """The ladder up to its upper rungs: hooks, bisection on a single rank, a rollback to each rank's own part."""
    launch = Launch(odd_dataset, tmp_path)
    code, _, err = launch.run(2, *WINDOWS, "--shard", "--drill", f"{kind}@4x9r1")
    assert code == 0, err
    incidents = read_events(launch.directory, "incident")
    assert incidents
    actions = " ".join(incident["action"] for incident in incidents)
    expected = {"nan-loss": "skipped", "nan-weight": "rolled back", "bad-sample": "quarantined"}[kind]
    assert expected in actions
    if kind == "bad-sample":
        assert all(len(incident["culprits"]) == 1 for incident in incidents)
    assert all(torch.isfinite(weight).all() for weight in launch.final()["model"].values())


@pytest.mark.slow
def test_sharded_backbone_that_learns_batchnorm_statistics_has_the_losses_of_replicas(
    odd_dataset: Path, tmp_path: Path
) -> None:
    """The rate is tiny: AdamW's first steps have the size of the rate, in whatever direction rounding turns them."""
    launches = Launch(odd_dataset, tmp_path / "sharded"), Launch(odd_dataset, tmp_path / "replicas")
    flags = ("--accumulation-steps", "1", "--batch-size", "3", "--backbone", "test_efficientnet", "--lr", "1e-6")
    for launch, shard in zip(launches, (["--shard"], []), strict=True):
        code, _, err = launch.run(2, *flags, *shard)
        assert code == 0, err
    require_same_curves(*launches)


@pytest.mark.slow
def test_frozen_levels_are_the_same_for_one_rank_for_replicas_and_for_shards(odd_dataset: Path, tmp_path: Path) -> None:
    weights = timm.create_model("test_convnext").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    flags = ("--backbone-weights", str(tmp_path / "weights.safetensors"), "--frozen-levels", "2")
    launches = []
    for ranks, more in ((1, ("--accumulation-steps", "6")), (2, WINDOWS), (2, (*WINDOWS, "--shard"))):
        launches.append(Launch(odd_dataset, tmp_path / f"{ranks}{more[-1]}"))
        code, _, err = launches[-1].run(ranks, *flags, *more)
        assert code == 0, err
        require_same_curves(launches[-1], launches[0])
        final = launches[-1].final()["model"]
        assert torch.equal(final["backbone.body.stem_0.weight"], weights["stem.0.weight"])


def test_module_that_is_not_sharded_stays_as_it_is() -> None:
    module = nn.Linear(3, 2)
    state = module.state_dict()
    assert whole_on_first({"a": [state["weight"], 1]}, is_first=False)["a"][0] is state["weight"]
    assert split_like(state["weight"], module.weight) is state["weight"]
    with whole_weights(module):
        assert local(module.weight) is module.weight
    load_whole_state(module, {name: torch.zeros_like(value) for name, value in state.items()})
    assert torch.equal(module.weight, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"weight has the shape \(2, 2\) in the file, not \(2, 3\)"):
        load_whole_state(module, nn.Linear(2, 2).state_dict())
    load_local_state(module, {name: torch.ones_like(value) for name, value in local_state(module).items()})
    assert torch.equal(module.weight, torch.ones(2, 3))
