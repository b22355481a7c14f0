"""``plan``: from a folder of photographs to settings that ``train --plan`` takes."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import failing, train

from commands.cli import parse
from commands.plan import LONGEST_TRIAL, TIME_FOR_TRIALS, choose
from data.facts import facts_of
from data.layouts import find_subsets, training_pairs
from data.masks import ABOVE_HALF
from data.synthetic import write_synthetic_dataset
from reporting.history import read_run
from runtime.checkpoint import read_checkpoint
from train_ultimate import main, run_plan, try_out
from training.costs import Costs
from training.rules import GB, Situation
from training.settings import Settings

CAMO = Situation(num_pairs=996, side=448, object_side=0.3, device="cpu", memory=8 * GB, disk=100 * GB)
SMALL = {
    "backbone": "test_efficientnet",
    "decoder_channels": 16,
    "img_size": 64,
    "pretrained": False,
    "frozen_levels": 0,
}


def costs(settings: Settings, _seconds: float = 0.0) -> Costs:
    """Return costs in proportion to the image's area: a second a window at 352 px."""
    window = (settings.img_size / 352) ** 2
    return Costs(5.0, {1: window / 2, 2: window}, 1.0, window / 16, "bf16", 6 * GB * window, 50e6)


def small_trial(given: Mapping[str, Any], seconds: float) -> Costs:
    return try_out({**given, **SMALL, "num_workers": 0, "precision": "fp32"}, min(seconds, 0.5))


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_synthetic_dataset(tmp_path / "own", num_train=30, num_test=0, img_size=64, seed=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "own"


def test_without_a_limit_the_most_able_network_gets_the_epochs_it_deserves() -> None:
    choice = choose(CAMO, {"dataset_path": "x"}, None, costs)
    assert (choice.settings.img_size, choice.settings.epochs, choice.wanted) == (352, 15, 15)
    assert choice.forecast.seconds == pytest.approx(12 + 15 * (112 * 1.0 + 1 + 100 / 16), rel=0.02)


@pytest.mark.parametrize(("hours", "size"), [(1.0, 352), (0.25, 352), (0.15, 288), (0.1, 224), (0.05, 160)])
def test_less_time_means_a_smaller_network_then_fewer_epochs(hours: float, size: int) -> None:
    choice = choose(CAMO, {"dataset_path": "x"}, hours, costs)
    assert choice.settings.img_size == size
    assert choice.forecast.seconds <= 3600 * hours
    assert 3 * choice.settings.epochs >= choice.wanted or size == 160


def test_sizes_that_would_take_far_too_long_are_not_tried() -> None:
    """On a busy machine, the time for trials would be over before one that fits."""
    tried = []

    def measure(settings: Settings, seconds: float) -> Costs:
        tried.append(settings.img_size)
        return costs(settings, seconds)

    choose(CAMO, {"dataset_path": "x"}, 0.05, measure)
    assert tried == [352, 160]


def test_what_does_not_fit_into_memory_is_passed_over() -> None:
    assert choose(replace(CAMO, memory=5 * GB), {"dataset_path": "x"}, None, costs).settings.img_size == 288


def test_trials_end_in_time() -> None:
    now, tried = 0.0, []

    def slow(settings: Settings, seconds: float) -> Costs:
        nonlocal now
        assert seconds <= LONGEST_TRIAL
        now += seconds
        tried.append(settings.img_size)
        return costs(settings)

    choose(CAMO, {"dataset_path": "x"}, 0.01, slow, clock=lambda: now)
    assert now <= TIME_FOR_TRIALS
    assert len(tried) >= 2


def test_a_network_that_cannot_be_tried_is_passed_over_and_the_last_reason_is_given() -> None:
    def only_small(settings: Settings, seconds: float) -> Costs:
        if settings.img_size > 224:
            raise ValueError("killed")
        return costs(settings, seconds)

    def none(_settings: Settings, _seconds: float) -> Costs:
        raise ValueError("killed")

    assert choose(CAMO, {"dataset_path": "x"}, None, only_small).settings.img_size == 224
    with pytest.raises(ValueError, match="killed"):
        choose(CAMO, {"dataset_path": "x"}, None, none)


def test_a_real_trial_measures_both_stages_and_leaves_nothing(photographs: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    given = {"dataset_path": str(photographs), **SMALL, "epochs": 3, "stage1_epochs": 1, "num_workers": 0}
    measured = try_out({**given, "batch_size": 4, "accumulation_steps": 1, "max_hours": 0.1}, 0.5)
    assert set(measured.windows) == {1, 2}
    assert min(*measured.windows.values(), measured.validation, measured.start) > 0
    assert measured.memory > 50e6
    assert measured.checkpoint > 100_000
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_plan_is_written_explained_and_taken_by_train(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The networks are exchanged for a small one by flags, which win."""
    assert run_plan(parse(["plan", "--dataset-path", str(photographs)]), small_trial) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Data: .*own, 30 photographs with masks.*64 px", printed, flags=re.MULTILINE)
    assert re.search(r"^--epochs +\d+ +\d+ optimizer steps", printed, flags=re.MULTILINE)
    assert re.search(r"^Time: about \d+ ", printed, flags=re.MULTILINE)
    assert printed.splitlines()[-1].endswith("train --plan plan.json")
    plan = json.loads(Path("plan.json").read_text())
    assert plan["settings"]["batch_size"] == 4
    assert plan["settings"]["val_fraction"] == 0.2
    flags = "--plan plan.json --backbone test_efficientnet --no-pretrained --decoder-channels 16 --frozen-levels 0"
    assert train(["train", *flags.split(), "--epochs", "1", "--num-workers", "0", "--precision", "fp32"]) == 0
    settings = read_checkpoint(Path("checkpoints/epoch_0001.pth"))["config"]["settings"]
    assert (settings["epochs"], settings["batch_size"], settings["lr"]) == (1, 4, 0.001)
    assert read_run(Path("checkpoints")).config["forecast"]["seconds"] == plan["forecast"]["seconds"]
    assert train(["train", "--resume", "auto", "--epochs", "2"]) == 0


def test_mistakes_are_answered_in_one_line(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.json").write_text('{"mine": 1}')
    assert "no such file; write one with: plan" in failing(["train", "--plan", "plan.json"], capsys)
    assert "not a file that plan has written" in failing(["train", "--plan", "notes.json"], capsys)
    for arguments, expected in (
        (["--dataset-path", "nowhere"], "no such folder"),
        (["--dataset-path", str(photographs), "--json", "notes.json"], "plan did not write it"),
    ):
        assert main(["plan", *arguments]) == 2
        assert expected in capsys.readouterr().err
    assert Path("notes.json").read_text() == '{"mine": 1}'


@pytest.mark.slow
def test_an_unknown_backbone_is_named(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--dataset-path", str(photographs), "--backbone", "resnet5O"]) == 2
    assert "resnet5O" in capsys.readouterr().err


def test_facts_of_a_dataset(photographs: Path) -> None:
    pairs = training_pairs(find_subsets(photographs), photographs)
    facts = facts_of(pairs, ABOVE_HALF)
    assert (facts.num_pairs, facts.side, facts.num_looked_at) == (30, 64, 30)
    assert 0 < facts.object_shares[0] <= facts.object_shares[1] <= facts.object_shares[2] < 0.5
    assert facts.empty_share == 0
    assert facts.object_side == pytest.approx(facts.object_shares[0] ** 0.5)
