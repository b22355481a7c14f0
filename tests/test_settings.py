"""``Settings``: names, defaults and ranges, and where each value comes from."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from training.settings import CHOICES, DEMO_DEFAULTS, RANGES, Settings, UsageError

# Other programs rely on these names and defaults: a change here is a breaking change.
FROZEN = {
    "dataset_path": None, "include_noncam": False, "exclude": None, "img_size": 384, "val_fraction": 0.1,
    "cache": False, "cache_dir": None,
    "backbone": "pvt_v2_b2", "pretrained": True, "backbone_weights": None, "frozen_levels": 0, "decoder_channels": 64,
    "zoom": [1.0], "multi_scale": [1.0],
    "epochs": 140, "stage1_epochs": 30, "batch_size": 2, "accumulation_steps": 4, "lr": 0.00025,
    "stage2_lr_scale": 0.5, "backbone_lr_scale": 0.1, "weight_decay": 1e-4, "ema_decay": 0.999,
    "mask_values": "auto", "grad_clip": 0.5, "spike_policy": "skip", "max_rollbacks": 3, "drill": [],
    "precision": "auto", "seed": 42, "deterministic": False,
    "resume": None, "checkpoint_dir": "./checkpoints", "keep_checkpoints": 3, "checkpoint_every": 0,
    "device": "auto", "rank_timeout": 60.0, "shard": False, "quiet": False, "json_logs": False,
    "max_hours": None, "start_from": None, "plan": None, "rehearse": None, "rehearse_share": 0.5,
    "folds": None, "fold": None,
    "augment_on": "loader", "channels_last": True, "compile": False, "gradient_checkpointing": False,
}  # fmt: skip


def saved_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings in the checkpoint of another run."""
    given = {"dataset_path": "photos", "lr": 0.1, "epochs": 50, "checkpoint_dir": "old", "pretrained": False}
    return {**Settings.resolve(given).to_dict(), **changes}


def test_names_and_defaults_are_frozen() -> None:
    expected = {
        **FROZEN,
        "dataset_path": "somewhere",
        "num_workers": None,
        "threads": None,
    }  # None: by the number of cores
    assert asdict(Settings(dataset_path="somewhere")) == expected
    assert Settings.resolve({"dataset_path": "somewhere"}).to_dict() == expected


def test_every_default_is_in_its_range_and_among_its_choices() -> None:
    assert {*RANGES, *CHOICES} <= {*FROZEN, "num_workers", "threads"}
    Settings(dataset_path="somewhere").check()


def test_what_was_typed_comes_before_the_resumed_run_before_the_preset_before_the_default() -> None:
    saved = saved_settings()
    del saved["grad_clip"]
    settings = Settings.resolve({"lr": 0.05}, saved, preset={"lr": 7.0, "epochs": 7, "grad_clip": 2.0})
    assert (settings.lr, settings.epochs, settings.grad_clip, settings.batch_size) == (0.05, 50, 2.0, 2)


def test_fewer_epochs_have_a_shorter_first_stage() -> None:
    for epochs, stage1 in ((140, 30), (300, 30), (70, 15), (10, 2), (1, 0)):
        assert Settings.resolve({"dataset_path": "x", "epochs": epochs}).stage1_epochs == stage1
    assert Settings.resolve({"epochs": 20}, saved_settings()).stage1_epochs == 11
    assert Settings.resolve({"dataset_path": "x", "epochs": 10, "stage1_epochs": 7}).stage1_epochs == 7


def test_dataset_is_needed_unless_resuming() -> None:
    with pytest.raises(UsageError, match="--dataset-path is needed"):
        Settings.resolve({})
    assert Settings.resolve({"resume": "auto"}, saved_settings()).dataset_path == "photos"


def test_resumed_settings_take_the_place_of_defaults_and_flags_win(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="train_ultimate"):
        settings = Settings.resolve({"resume": "auto", "lr": 0.05}, saved_settings(quiet=True, drill=["kill@3"]))
    assert (settings.dataset_path, settings.lr, settings.epochs, settings.pretrained) == ("photos", 0.05, 50, False)
    assert (settings.resume, settings.checkpoint_dir) == ("auto", "./checkpoints")  # of this invocation
    assert (settings.quiet, settings.drill) == (False, [])
    assert caplog.messages == ["lr: 0.1 -> 0.05"]


def test_saved_settings_that_this_version_does_not_know_are_ignored() -> None:
    assert Settings.resolve({}, saved_settings(samples_per_moon=3)) == Settings.resolve({}, saved_settings())


def test_what_is_decided_at_the_start_is_ignored_on_resume_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.resolve({"resume": "auto", "pretrained": True, "val_fraction": 0.5}, saved_settings())
    assert (settings.pretrained, settings.val_fraction) == (False, 0.1)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(":")[0] for message in warnings] == ["Ignored --pretrained", "Ignored --val-fraction"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": "resnet18"}, "--backbone resnet18: the checkpoint was trained with pvt_v2_b2"),
        ({"decoder_channels": 32}, "--decoder-channels 32: the checkpoint was trained with 64"),
        ({"zoom": [0.5, 1.0]}, r"--zoom \[0.5, 1.0\]: the checkpoint was trained with"),
    ],
)
def test_the_network_cannot_change_on_resume_unless_there_are_no_weights_yet(
    given: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Settings.resolve(given, saved_settings())
    Settings.resolve(given, saved_settings(), has_weights=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, "--lr must be above 0, not -1"),
        ("lr", "fast", "--lr must be a number, not 'fast'"),
        ("batch_size", 0, "--batch-size must be at least 1, not 0"),
        ("batch_size", 2.5, "--batch-size must be a whole number, not 2.5"),
        ("epochs", True, "--epochs must be a whole number, not True"),
        ("multi_scale", [9.0], "--multi-scale must be at least 0.25 and at most 4, not 9"),
        ("precision", "fp8", "--precision fp8: choose from auto, fp16, bf16, tf32, fp32"),
        ("img_size", 350, "--img-size 350 is not a multiple of 32"),
        ("stage1_epochs", 60, "--stage1-epochs 60 is more than --epochs 50"),
    ],
)
def test_saved_settings_out_of_range_are_refused_with_the_flags_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        Settings.resolve({}, saved_settings(**{name: value}))
    assert message in str(error.value)


def test_zoom_and_multi_scale_without_factors_have_their_own() -> None:
    settings = Settings.resolve({"dataset_path": "x", "zoom": [], "multi_scale": []})
    assert (settings.zoom, settings.multi_scale) == ([0.5, 1.0, 1.5], [0.75, 1.0, 1.25])
    assert Settings.resolve({"dataset_path": "x", "zoom": [2.0, 1.0, 2.0]}).zoom == [1.0, 2.0]


def test_demos_preset_changes_only_defaults() -> None:
    assert DEMO_DEFAULTS.keys() <= FROZEN.keys()
    settings = Settings.resolve({"epochs": 5}, preset=DEMO_DEFAULTS)
    assert (settings.dataset_path, settings.pretrained, settings.epochs) == ("synthetic", False, 5)
