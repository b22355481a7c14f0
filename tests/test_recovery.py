"""Whole runs that meet faults: what recovery does about them, and that a passing fault leaves no trace."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, prepare_run, signal_at_step, tiny_arguments, train
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launching import read_events
from PIL import Image
from torch import Tensor, nn

from commands.replay import replay
from data.loading import to_device, training_loader
from losses import deep_supervision_loss
from models.network import CamouflageSegmenter, build_network
from runtime.checkpoint import read_checkpoint
from runtime.log import Listener
from runtime.machine import ScalerSettings
from train_ultimate import begin_stage, run_stage, train_epoch
from training.drill import Drill
from training.run import Run
from training.stages import learning_rate
from training.window import Loss

TRAINED = ("model", "ema", "optimizer", "scaler", "detector")


def final(directory: Path, epoch: int = 4) -> dict[str, Any]:
    state = read_checkpoint(directory / f"epoch_{epoch:04d}.pth")
    return {key: state[key] for key in TRAINED}


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the checkpoint folder of a run without faults, by precision."""
    directories: dict[str, Path] = {}

    def directory(precision: str) -> Path:
        if precision not in directories:
            directories[precision] = tmp_path_factory.mktemp(precision)
            assert train(tiny_arguments(tiny_dataset, directories[precision], "--precision", precision)) == 0
        return directories[precision]

    return directory


# Passing faults cost the time of a window and nothing else


@pytest.mark.parametrize("drill", ["nan-loss@2", "nan-loss@11", "inf-grad@12", "nan-loss@16"])
def test_after_a_passing_fault_the_weights_are_bitwise_those_of_a_run_without(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path, drill: str
) -> None:
    assert train(tiny_argv("--drill", drill)) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed("fp32"))) == []
    (incident,) = read_events(tmp_path / "run", "incident")
    assert (incident["action"], incident["cause"]) == ("run again, and applied", "not reproduced")
    assert [attempt["verdict"] for attempt in incident["attempts"]][1] == "applied"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "faults"),
    [("bf16", ("nan-loss@6", "inf-grad@13")), pytest.param("fp16", ("nan-loss@6",), marks=pytest.mark.slow)],
)
def test_the_same_in_half_precision(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path, precision: str, faults: tuple[str, ...]
) -> None:
    """The fp16 loss scale does not change either: a loss that is not finite says nothing about it."""
    drills = [flag for fault in faults for flag in ("--drill", fault)]
    assert train(tiny_argv("--precision", precision, *drills)) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed(precision))) == []


@pytest.mark.slow
def test_a_stop_during_recovery_waits_for_it(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path
) -> None:
    """SIGTERM arrives at the step of a window whose verdict is not known yet."""
    with signal_at_step(6):
        assert train(tiny_argv("--drill", "nan-loss@6")) == 143
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert saved.name == "step_00000006.pth"
    assert read_checkpoint(saved)["ladder"]["num_applied"] == 6
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed("fp32"))) == []


# Windows that are not applied


def state_after(run: Run, stage_number: int, windows: int, drills: list[Drill]) -> dict[str, Any]:
    """Return everything trained after that many windows, of two images each, of the stage's first epoch."""
    stage, state = run.stages[stage_number - 1], run.state
    state.progress.epoch, state.drills = stage.first_epoch, drills

    def stop(*_: Any) -> None:
        if state.progress.window >= windows - 1:
            run.signals.signal_number = 15

    state.optimizer.register_step_pre_hook(stop)
    if windows == 0:
        run.signals.signal_number = 15
    begin_stage(run, stage)
    train_epoch(run, stage, training_loader(run.data.train_pairs, 64, 2, run.settings.seed, 0, pin_memory=False))
    assert state.progress.window == windows
    trained = state.state_dict()
    return copy.deepcopy({**{key: trained[key] for key in ("model", "ema")}, "moments": trained["optimizer"]["state"]})


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    kind=st.sampled_from(["nan-loss", "inf-grad", "spike", "overflow"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    stage=st.sampled_from([1, 2]),
    window=st.integers(1, 9),
)
def test_a_skipped_window_leaves_weights_moments_average_and_buffers_bitwise_unchanged(
    tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, precision: str, stage: int, window: int
) -> None:
    """Compare parameters, exp_avg, exp_avg_sq, step, average and BatchNorm statistics, which this backbone learns."""
    if kind == "spike":
        window = max(window, 6)  # before, there is no history to exceed
    if kind == "overflow":
        precision = "fp16"
    flags = ("--accumulation-steps", "1", "--precision", precision)

    def fresh() -> Run:
        return prepare_run(tiny_arguments(tiny_dataset, tmp_path_factory.mktemp("run"), *flags))

    before = state_after(fresh(), stage, window - 1, [])
    run = fresh()
    count = 1 if kind in ("spike", "overflow") or (kind, precision) == ("inf-grad", "fp16") else 3
    after = state_after(run, stage, window, [Drill(kind, window, count)])
    assert sum(run.state.ladder.skipped.values()) == 1
    assert differing_tensors(before, after) == []


# Samples at fault


def with_flat_image(tiny_dataset: Path, root: Path, name: str = "scene_00004.jpg") -> Path:
    """Copy the dataset, with one photograph replaced by a decodable one of a single colour."""
    shutil.copytree(tiny_dataset / "TrainDataset", root / "TrainDataset")
    Image.new("RGB", (64, 64), (0, 255, 0)).save(root / "TrainDataset" / "Imgs" / name, quality=100)
    return root


def has_flat_image(images: Tensor) -> bool:
    """Return whether most of an image has one colour: augmentation may have rotated it and left black corners."""
    pixels = images.flatten(2)
    deviation = (pixels - pixels.median(dim=2, keepdim=True).values).abs().median(dim=2).values
    return bool((deviation < 0.01).all(dim=1).any())


def broken_normalisation(stem: nn.Module) -> None:
    """Make an image of a single colour turn the batch NaN, as division by its deviation without an epsilon would."""
    stem.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (torch.nan if has_flat_image(inputs[0]) else 1),))


def large_activations(stem: nn.Module) -> None:
    """Give a batch with an image of a single colour activations of about 1e6: fine in fp32, infinite in fp16."""

    def enlarge(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        stem.factor = 2.0**20 if has_flat_image(inputs[0]) else 1.0  # type: ignore[assignment]
        return (inputs[0] * stem.factor,)

    stem.register_forward_pre_hook(enlarge)
    stem.register_forward_hook(lambda _module, _inputs, output: output.float() / stem.factor)


def weak(weaken: Callable[[nn.Module], None]) -> Callable[..., CamouflageSegmenter]:
    """Return a builder of networks that have a weakness in their first layer."""

    def build(*args: Any) -> CamouflageSegmenter:
        model = build_network(*args)
        weaken(model.get_submodule("backbone.body.conv_stem"))
        return model

    return build


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_poisoned_image_is_named_and_quarantined_and_the_run_finishes(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    root, build = with_flat_image(tiny_dataset, tmp_path / "data"), weak(broken_normalisation)
    assert train(tiny_argv("--dataset-path", str(root), "--precision", precision), build_network=build) == 0
    directory = tmp_path / "run"
    incidents = read_events(directory, "incident")
    assert incidents
    for incident in incidents:
        assert incident["cause"] == "data"
        assert incident["culprits"] == ["TrainDataset/Imgs/scene_00004.jpg"]
        assert incident["verdict"] == "nonfinite_loss"
        stored = json.loads((directory / "incidents" / incident["folder"] / "incident.json").read_text())
        assert stored["culprits"] == incident["culprits"]
        assert stored["first_nonfinite"].startswith("backbone.body.conv_stem (output")
    out = capsys.readouterr().out
    assert "quarantined until epoch" in out
    assert "   Quarantined until epoch 9: TrainDataset/Imgs/scene_00004.jpg" in out
    assert read_events(directory, "run_end")[0]["recovery"]["skipped"] == {}

    shutil.copytree(directory / "incidents" / incidents[0]["folder"], tmp_path / "elsewhere")
    shutil.rmtree(root)
    shutil.rmtree(directory)
    assert replay(tmp_path / "elsewhere", "auto", build) == 0
    out = capsys.readouterr().out
    assert out.count(incidents[0]["first_nonfinite"]) == 3  # recorded, replayed, replayed in fp32
    assert "Alone, in fp32, this sample does it: TrainDataset/Imgs/scene_00004.jpg" in out
    assert "Cause: data" in out


@pytest.mark.slow
def test_quarantine_lasts_its_epochs_even_over_a_restart(tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """The image offends in epoch 1, is out in epochs 2 and 3, returns in epoch 4 and offends again."""
    root, build = with_flat_image(tiny_dataset, tmp_path / "data"), weak(broken_normalisation)
    flags = ("--dataset-path", str(root), "--keep-checkpoints", "9", "--accumulation-steps", "1")
    assert train(tiny_argv(*flags), build_network=build) == 0
    directory = tmp_path / "run"
    assert [incident["epoch"] for incident in read_events(directory, "incident")] == [1, 4]
    for epoch in (2, 3, 4):
        (directory / f"epoch_000{epoch}.pth").unlink()
    (directory / "best_model.pth").unlink()
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(directory)], build_network=build) == 0
    assert [incident["epoch"] for incident in read_events(directory, "incident")] == [1, 4, 4]
    ladder = read_checkpoint(directory / "epoch_0004.pth")["ladder"]
    assert ladder["offences"] == {"TrainDataset/Imgs/scene_00004.jpg": 2}
    assert ladder["quarantine"] == {"TrainDataset/Imgs/scene_00004.jpg": 8}


# Rolling back


def test_weight_that_becomes_nan_is_rolled_back_with_half_the_rate(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_argv("--drill", "nan-weight@6")) == 0
    directory = tmp_path / "run"
    (incident,) = read_events(directory, "incident")
    assert incident["cause"] == "model"
    assert "rolled back by" in incident["action"]
    windows = read_events(directory, "window")
    bad = next(i for i, entry in enumerate(windows) if entry["verdict"] == "nonfinite_loss")
    undisturbed_lr = learning_rate(prepare_run(tiny_argv(checkpoint_dir=tmp_path / "other")).stages[0], bad + 1, 8)
    assert windows[bad + 1]["lr"] == pytest.approx(undisturbed_lr / 2)
    assert all(
        torch.isfinite(value).all() for value in read_checkpoint(directory / "epoch_0004.pth")["ema"]["model"].values()
    )
    assert "1 rollback (learning rates now x 0.5)" in capsys.readouterr().out


def test_weight_that_becomes_nan_in_the_last_window_is_found_before_anything_is_saved(
    tiny_argv: Argv, tmp_path: Path
) -> None:
    assert train(tiny_argv("--drill", "nan-weight@16")) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert incident["verdict"] == "nonfinite_weights"
    read_checkpoint(tmp_path / "run" / "epoch_0004.pth")


def test_rollback_returns_to_weights_that_were_good_and_resets_moments(tiny_argv: Argv) -> None:
    run = prepare_run(tiny_argv("--accumulation-steps", "1"))
    good = copy.deepcopy(run.state.model.state_dict())
    differing: list[list[str]] = []
    moments: list[float] = []

    class AtRollback:
        """Listener that looks at the state when a rollback is logged, before the next step."""

        def event(self, event: str, fields: dict[str, Any]) -> None:
            if event == "incident" and "rolled back" in fields["action"]:
                differing.append(differing_tensors(run.state.model.state_dict(), good))
                entries = list(run.state.optimizer.state.values())
                steps = max(entry["step"].item() for entry in entries)
                moments.append(steps + max(float(entry["exp_avg"].abs().max()) for entry in entries))

        def close(self) -> None:
            pass

    run.folder.log.listeners.append(AtRollback())
    state_after(run, 1, 8, [Drill("nan-weight", 5, 1)])
    assert (differing, moments) == ([[]], [0.0])


def diverging(first: int, factor: float) -> Loss:
    """Return the loss, ``factor`` times higher from its nth batch on. Clipping keeps everything else ordinary."""
    calls = 0

    def loss(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return deep_supervision_loss(*args) * (factor if calls >= first else 1)

    return loss


@pytest.mark.slow
def test_loss_that_runs_away_without_a_nan_is_rolled_back_and_then_ends_the_run_resumably(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--accumulation-steps", "1", "--epochs", "14", "--max-rollbacks", "2", "--spike-policy", "clip")
    assert train(tiny_argv(*flags), loss=diverging(first=80, factor=3.0)) == 3
    directory = tmp_path / "run"
    incidents = read_events(directory, "incident")
    assert [incident["verdict"] for incident in incidents] == ["diverged"] * 3
    assert [incident["action"].split(" ")[0] for incident in incidents] == ["rolled", "rolled", "stopped:"]
    error = capsys.readouterr().err
    assert "all recoveries spent: the loss" in error
    assert "--resume auto" in error
    assert error.rstrip().endswith("--lr 0.00025")  # half of what has failed, 0.002 / 4
    (saved,) = directory.glob("step_*.pth")
    assert str(saved) in error
    assert read_checkpoint(saved)["ladder"]["lr_factor"] == 0.25
    resume = ["train", "--resume", "auto", "--checkpoint-dir", str(directory)]
    assert train(resume) == 0
    out = capsys.readouterr().out
    assert "Learning rates are multiplied by 0.25, after 2 rollbacks" in out


@pytest.mark.slow
def test_without_rollbacks_a_loss_that_runs_away_is_left_alone(tiny_argv: Argv, tmp_path: Path) -> None:
    flags = ("--accumulation-steps", "1", "--epochs", "12", "--max-rollbacks", "0", "--spike-policy", "off")
    assert train(tiny_argv(*flags), loss=diverging(first=80, factor=3.0)) == 0
    assert read_events(tmp_path / "run", "incident") == []


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_when_every_rung_is_spent_the_run_ends_with_a_good_checkpoint(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    assert train(tiny_argv("--precision", precision, "--drill", "nan-weight@2x40")) == 3
    directory = tmp_path / "run"
    actions = [incident["action"] for incident in read_events(directory, "incident")]
    assert [action.split(" ")[0] for action in actions] == ["rolled"] * (len(actions) - 1) + ["stopped:"]
    assert len(actions) == (4 if precision == "fp32" else 5)
    assert sum("from here on in fp32" in action for action in actions) == (0 if precision == "fp32" else 1)
    assert "Traceback" not in capsys.readouterr().err
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(directory), "--lr", "0.0001"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.002 -> 0.0001" in out
    assert "left by rollbacks, is dropped" in out
    assert "Learning rates are multiplied" not in out  # a new --lr is used as given
    assert read_events(directory, "window")[-1]["precision"] == "fp32"


def test_a_launcher_that_restarts_a_diverged_run_gets_the_same_exit_code(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny_argv("--max-rollbacks", "0", "--drill", "nan-weight@2", "--resume", "auto")
    assert train(argv) == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert train(argv) == 3
    assert "diverged before, and the same command would again" in capsys.readouterr().err
    assert train([*argv, "--lr", "0.001"]) == 0  # nor is the drill repeated


def test_without_rollbacks_windows_that_are_skipped_repeatedly_do_not_end_the_run(
    tiny_argv: Argv, tmp_path: Path
) -> None:
    flags = ("--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "2", "--max-rollbacks", "0")
    assert train(tiny_argv(*flags, "--drill", "spike@6x12")) == 0
    assert read_events(tmp_path / "run", "run_end")[0]["recovery"]["skipped"]["spike"] >= 8


def test_a_single_sample_in_the_first_window_is_quarantined_without_a_rollback(tiny_argv: Argv, tmp_path: Path) -> None:
    flags = ("--batch-size", "1", "--accumulation-steps", "1", "--epochs", "1", "--stage1-epochs", "1")
    assert train(tiny_argv(*flags, "--drill", "bad-sample@1")) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert incident["action"].startswith("quarantined until epoch 4")
    recovery = read_events(tmp_path / "run", "run_end")[0]["recovery"]
    assert (recovery["rollbacks"], recovery["lr_factor"]) == (0, 1.0)


def test_a_statistic_that_is_not_finite_is_found_before_anything_is_saved(tiny_argv: Argv, tmp_path: Path) -> None:
    """BatchNorm in training does not use its running variance, so nothing else would show it."""

    def corrupted(run: Run) -> list[Listener]:
        def corrupt(*_: Any) -> None:
            if run.state.progress.global_window == 9:
                next(b for n, b in run.state.model.named_buffers() if n.endswith("running_var")).fill_(torch.inf)

        run.state.optimizer.register_step_post_hook(corrupt)
        return []

    assert train(tiny_argv(), listeners_of=corrupted) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert (incident["verdict"], incident["cause"]) == ("nonfinite_weights", "model")


def test_initial_weights_that_are_not_finite_are_refused(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any) -> CamouflageSegmenter:
        model = build_network(*args)
        next(model.parameters()).data.fill_(torch.nan)
        return model

    assert train(tiny_argv(), build_network=broken) == 2
    assert "initial weights are not finite" in capsys.readouterr().err


# fp16


@pytest.mark.slow
def test_values_beyond_fp16_are_rerun_in_fp32_and_nothing_is_quarantined(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, build = with_flat_image(tiny_dataset, tmp_path / "data"), weak(large_activations)
    assert train(tiny_argv("--dataset-path", str(root), "--precision", "fp16"), build_network=build) == 0
    incidents = read_events(tmp_path / "run", "incident")
    assert len(incidents) == 4  # once an epoch
    for incident in incidents:
        assert (incident["cause"], incident["action"]) == ("precision", "run again in fp32, and applied")
        assert [attempt["precision"] for attempt in incident["attempts"]] == ["fp16", "fp16", "fp32"]
    recovery = read_events(tmp_path / "run", "run_end")[0]["recovery"]
    assert (recovery["skipped"], recovery["quarantined"]) == ({}, {})

    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run" / "incidents" / incidents[-1]["folder"], elsewhere)
    capsys.readouterr()
    assert replay(elsewhere, "auto", build) == 0
    out = capsys.readouterr().out
    assert re.search(r"^replayed, fp16 +nan", out, re.MULTILINE)
    assert re.search(r"^replayed, fp32 +\d\.\d+ .*none$", out, re.MULTILINE)
    assert "Cause: precision: it is finite in fp32" in out


def test_the_crash_the_project_began_with(tiny_argv: Argv, tmp_path: Path) -> None:
    """Stage 2 at full rate, an fp16 scale of 2^16, and an infinite norm at batch 5: the bare loop raises there.

    Ours finishes, with losses like those of fp32 without the fault. Like, not equal: one update of twenty is lost, and
    AdamW turns the rounding of fp16 into steps of full size. On three machines the largest difference was 1 to 3 %.
    """
    same = ("--stage2-lr-scale", "1", "--accumulation-steps", "1")  # ten windows an epoch, of which one is lost
    flags = (*same, "--precision", "fp16", "--drill", "inf-grad@25")
    run = prepare_run(tiny_argv(*flags))
    first, second = run.stages
    for stage in (first, replace(second, scaler=ScalerSettings(init_scale=2.0**16))):
        run_stage(run, stage)
    run.folder.store.wait()
    windows = read_events(tmp_path / "run", "window")
    assert windows[20]["loss_scale"] == 2.0**16
    assert {entry["verdict"] for entry in windows} == {"applied", "overflow"}
    assert train(tiny_argv(*same, checkpoint_dir=tmp_path / "fp32")) == 0
    ours = [event["loss"] for event in read_events(tmp_path / "run", "epoch")]
    reference = [event["loss"] for event in read_events(tmp_path / "fp32", "epoch")]
    assert ours == pytest.approx(reference, rel=0.15)
    with pytest.raises(RuntimeError, match="non-finite"):
        bare_loop(prepare_run(tiny_argv(*flags, checkpoint_dir=tmp_path / "bare")))


def bare_loop(run: Run) -> None:
    """Train stage 2 as it is usually written, with ``error_if_nonfinite``; one gradient is infinite at batch 5."""
    model = run.state.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.settings.lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    loader = training_loader(run.data.train_pairs, 64, 2, run.settings.seed, num_workers=0, pin_memory=False)
    for number, batch in enumerate(loader, start=1):
        images, masks = to_device(batch, run.machine.device, run.machine.memory_format)
        with run.machine.precision.autocast():
            outputs = model(images)
        scaler.scale(deep_supervision_loss(outputs, masks, 0.0)).backward()
        if number == 5:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
