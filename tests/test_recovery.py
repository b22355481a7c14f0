"""Whole runs that meet faults: what recovery does about them, and that it leaves no trace where it need not."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, SignalAt, differing_tensors, tiny_arguments
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launching import read_events
from PIL import Image
from torch import Tensor, nn

import train_ultimate
import training.window as window_module
from commands import cli, replay
from data.loading import training_loader
from losses import deep_supervision_loss
from models.network import CamouflageSegmenter
from runtime.checkpoint import read_checkpoint
from runtime.machine import ScalerSettings
from train_ultimate import main, train_epoch
from training import setup as builders
from training.drill import Drill
from training.run import Run
from training.setup import prepare
from training.stages import learning_rate

TRAINED = ("model", "ema", "optimizer", "scaler", "detector")


def final(directory: Path, epoch: int = 4) -> dict[str, Any]:
    state = read_checkpoint(directory / f"epoch_{epoch:04d}.pth")
    return {key: state[key] for key in TRAINED}


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint directory of a run without faults, by precision."""
    directories: dict[str, Path] = {}

    def directory(precision: str) -> Path:
        if precision not in directories:
            directories[precision] = tmp_path_factory.mktemp(precision)
            assert main(tiny_arguments(tiny_dataset, directories[precision], "--precision", precision)) == 0
        return directories[precision]

    return directory


# A passing fault costs the time of a window and nothing else


@pytest.mark.parametrize("drill", ["nan-loss@2", "nan-loss@11", "inf-grad@12", "nan-loss@16"])
def test_after_a_passing_fault_the_weights_are_bitwise_those_of_a_run_without(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path, drill: str
) -> None:
    assert main(tiny_argv("--drill", drill)) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed("fp32"))) == []
    (incident,) = read_events(tmp_path / "run", "incident")
    assert (incident["action"], incident["cause"]) == ("run again, and applied", "not reproduced")
    assert [attempt["verdict"] for attempt in incident["attempts"]][1] == "applied"


@pytest.mark.parametrize(("precision", "faults"), [("bf16", ("nan-loss@6", "inf-grad@13")), ("fp16", ("nan-loss@6",))])
def test_the_same_in_half_precision(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path, precision: str, faults: tuple[str, ...]
) -> None:
    """Under fp16 the loss scale stays as it is, too: a loss that is not finite says nothing about it."""
    drills = [flag for fault in faults for flag in ("--drill", fault)]
    assert main(tiny_argv("--precision", precision, *drills)) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed(precision))) == []


def test_a_stop_in_the_midst_of_recovery_waits_for_it(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM right after the window whose verdict is not known yet."""
    SignalAt(monkeypatch, "gated_step", 6)
    assert main(tiny_argv("--drill", "nan-loss@6")) == 143
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert saved.name == "step_00000006.pth"
    assert read_checkpoint(saved)["ladder"]["num_applied"] == 6
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed("fp32"))) == []


# A window that is not applied


class StopAfter:
    """Stands in for ``StopRequest``: a stop is asked for once so many windows of the epoch are done."""

    save = False

    def __init__(self, run: Run, windows: int) -> None:
        self.run, self.windows = run, windows

    @property
    def signal_number(self) -> int | None:
        return 15 if self.run.state.progress.window >= self.windows else None

    def told(self) -> list[float]:
        return []

    def hear(self, counts: Sequence[float]) -> None:
        pass


def state_after(run: Run, stage_number: int, windows: int, drills: list[Drill]) -> dict[str, Any]:
    """Everything trained, after so many windows of the stage's first epoch, each of two images."""
    stage = run.stages[stage_number - 1]
    run.state.model.set_backbone_frozen(stage.freeze_backbone)  # type: ignore[operator]
    run.state.scaler = run.precision.new_scaler(stage.scaler)
    run.state.progress.stage, run.state.progress.epoch = stage.number, stage.first_epoch
    run.drills, run.stop = drills, StopAfter(run, windows)  # type: ignore[assignment]
    train_ultimate.fresh_moments(run.state.optimizer, everywhere=False)
    run.recovery.begin_stage()
    train_epoch(run, stage, training_loader(run.train_pairs, 64, 2, run.args.seed, num_workers=0, pin_memory=False))
    assert run.state.progress.window == windows
    state = run.state.state_dict()
    return copy.deepcopy({**{key: state[key] for key in ("model", "ema")}, "moments": state["optimizer"]["state"]})


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    kind=st.sampled_from(["nan-loss", "inf-grad", "spike", "overflow"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    stage=st.sampled_from([1, 2]),
    window=st.integers(1, 9),
)
def test_window_that_is_given_up_leaves_weights_moments_average_and_buffers_bitwise_as_they_were(
    tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, precision: str, stage: int, window: int
) -> None:
    """Parameters, exp_avg, exp_avg_sq, step, averaged weights, BatchNorm statistics; this backbone trains its own."""
    if kind == "spike":
        window = max(window, 6)  # before, there is no history to be far above
    if kind == "overflow":
        precision = "fp16"
    flags = ("--accumulation-steps", "1", "--precision", precision)

    def fresh() -> Run:
        return prepare(tiny_arguments(tiny_dataset, tmp_path_factory.mktemp("run"), *flags))

    before = state_after(fresh(), stage, window - 1, [])
    run = fresh()
    count = 1 if kind in ("spike", "overflow") or (kind, precision) == ("inf-grad", "fp16") else 3
    after = state_after(run, stage, window, [Drill(kind, window, count)])
    assert sum(run.state.ladder.skipped.values()) == 1
    assert differing_tensors(before, after) == []


# A sample at fault


def with_flat_image(tiny_dataset: Path, root: Path, name: str = "scene_00004.jpg") -> Path:
    """The data set with one photograph replaced by a decodable one of a single colour."""
    shutil.copytree(tiny_dataset / "TrainDataset", root / "TrainDataset")
    Image.new("RGB", (64, 64), (0, 255, 0)).save(root / "TrainDataset" / "Imgs" / name, quality=100)
    return root


def has_flat_image(images: Tensor) -> bool:
    """Whether most of an image is of one colour: augmentation may have turned it and left black corners."""
    pixels = images.flatten(2)
    deviation = (pixels - pixels.median(dim=2, keepdim=True).values).abs().median(dim=2).values
    return bool((deviation < 0.01).all(dim=1).any())


def broken_normalisation(stem: nn.Module) -> None:
    """An image of a single colour makes the batch NaN: what dividing by its deviation, without an epsilon, would do."""
    stem.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (torch.nan if has_flat_image(inputs[0]) else 1),))


def large_activations(stem: nn.Module) -> None:
    """A batch with an image of a single colour has activations of some 1e6: fine in fp32, infinite in fp16."""

    def enlarge(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        stem.factor = 2.0**20 if has_flat_image(inputs[0]) else 1.0  # type: ignore[assignment]
        return (inputs[0] * stem.factor,)

    stem.register_forward_pre_hook(enlarge)
    stem.register_forward_hook(lambda _module, _inputs, output: output.float() / stem.factor)


@pytest.fixture
def weakness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that get a weakness in their first layer, wherever they are built."""
    original = builders.build_network

    def build(*args: Any, **options: Any) -> CamouflageSegmenter:
        model = original(*args, **options)
        request.param(model.backbone.body.conv_stem)
        return model

    monkeypatch.setattr(builders, "build_network", build)
    monkeypatch.setattr(replay, "build_network", build)


@pytest.mark.parametrize("weakness", [broken_normalisation], indirect=True)
@pytest.mark.usefixtures("weakness")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_poisoned_image_is_named_and_quarantined_and_the_run_finishes(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    root = with_flat_image(tiny_dataset, tmp_path / "data")
    assert main(tiny_argv("--dataset-path", str(root), "--precision", precision)) == 0
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
    assert main(["replay", str(tmp_path / "elsewhere")]) == 0
    out = capsys.readouterr().out
    assert out.count(incidents[0]["first_nonfinite"]) == 3  # recorded, replayed, replayed in fp32
    assert "Alone, in fp32, this sample does it: TrainDataset/Imgs/scene_00004.jpg" in out
    assert "Cause: data" in out


@pytest.mark.parametrize("weakness", [broken_normalisation], indirect=True)
@pytest.mark.usefixtures("weakness")
def test_quarantine_lasts_its_epochs_also_over_a_restart(tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """Offends in epoch 1, is out in epochs 2 and 3, is back in epoch 4 and offends again."""
    root = with_flat_image(tiny_dataset, tmp_path / "data")
    flags = ("--dataset-path", str(root), "--keep-checkpoints", "9", "--accumulation-steps", "1")
    assert main(tiny_argv(*flags)) == 0
    directory = tmp_path / "run"
    assert [incident["epoch"] for incident in read_events(directory, "incident")] == [1, 4]
    for epoch in (2, 3, 4):
        (directory / f"epoch_000{epoch}.pth").unlink()
    (directory / "best_model.pth").unlink()
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(directory)]) == 0
    assert [incident["epoch"] for incident in read_events(directory, "incident")] == [1, 4, 4]
    ladder = read_checkpoint(directory / "epoch_0004.pth")["ladder"]
    assert ladder["offences"] == {"TrainDataset/Imgs/scene_00004.jpg": 2}
    assert ladder["quarantine"] == {"TrainDataset/Imgs/scene_00004.jpg": 8}


# Rolling back


def test_weight_that_becomes_nan_is_rolled_back_with_half_the_rate(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_argv("--drill", "nan-weight@6")) == 0
    directory = tmp_path / "run"
    (incident,) = read_events(directory, "incident")
    assert incident["cause"] == "model"
    assert "rolled back by" in incident["action"]
    windows = read_events(directory, "window")
    bad = next(i for i, entry in enumerate(windows) if entry["verdict"] == "nonfinite_loss")
    undisturbed_lr = learning_rate(prepare_stages(tiny_argv)[0], bad + 1, 8)
    assert windows[bad + 1]["lr"] == pytest.approx(undisturbed_lr / 2)
    assert all(
        torch.isfinite(value).all() for value in read_checkpoint(directory / "epoch_0004.pth")["ema"]["model"].values()
    )
    assert "1 rollback (learning rates now x 0.5)" in capsys.readouterr().out


def prepare_stages(tiny_argv: Argv) -> list[Any]:
    return builders.build_stages(cli.parse(tiny_argv()))


def test_weight_that_becomes_nan_in_the_last_window_is_found_before_anything_is_saved(
    tiny_argv: Argv, tmp_path: Path
) -> None:
    assert main(tiny_argv("--drill", "nan-weight@16")) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert incident["verdict"] == "nonfinite_weights"
    read_checkpoint(tmp_path / "run" / "epoch_0004.pth")


def test_rollback_returns_to_weights_that_were_good_and_starts_moments_anew(
    tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(tiny_argv("--accumulation-steps", "1"))
    good = copy.deepcopy(run.state.model.state_dict())
    moments: list[float] = []
    original = run.recovery._roll_back

    def watched(reason: str) -> None:
        original(reason)
        assert differing_tensors(run.state.model.state_dict(), good) == []
        steps = [entry["step"].item() for entry in run.state.optimizer.state.values()]
        moments.append(max(steps) + max(float(e["exp_avg"].abs().max()) for e in run.state.optimizer.state.values()))

    monkeypatch.setattr(run.recovery, "_roll_back", watched)
    state_after(run, 1, 8, [Drill("nan-weight", 5, 1)])
    assert moments == [0.0]


def diverging(monkeypatch: pytest.MonkeyPatch, first: int, factor: float) -> None:
    """The loss, factor times higher from its nth batch on. Gradients are clipped, so nothing else is unusual."""
    calls = 0

    def loss(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return deep_supervision_loss(*args) * (factor if calls >= first else 1)

    monkeypatch.setattr(window_module, "deep_supervision_loss", loss)


def test_loss_that_runs_away_without_a_nan_is_rolled_back_and_then_ends_the_run_resumably(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging(monkeypatch, first=80, factor=3.0)
    flags = ("--accumulation-steps", "1", "--epochs", "14", "--max-rollbacks", "2", "--spike-policy", "clip")
    assert main(tiny_argv(*flags)) == 3
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
    monkeypatch.setattr(window_module, "deep_supervision_loss", deep_supervision_loss)
    resume = ["train", "--resume", "auto", "--checkpoint-dir", str(directory)]
    assert main(resume) == 0
    out = capsys.readouterr().out
    assert "Learning rates are multiplied by 0.25: 2 rollbacks" in out


def test_without_rollbacks_a_loss_that_runs_away_is_left_alone(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, first=80, factor=3.0)
    flags = ("--accumulation-steps", "1", "--epochs", "12", "--max-rollbacks", "0", "--spike-policy", "off")
    assert main(tiny_argv(*flags)) == 0
    assert read_events(tmp_path / "run", "incident") == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_when_every_rung_is_spent_the_run_ends_with_a_good_checkpoint(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    assert main(tiny_argv("--precision", precision, "--drill", "nan-weight@2x40")) == 3
    directory = tmp_path / "run"
    actions = [incident["action"] for incident in read_events(directory, "incident")]
    assert [action.split(" ")[0] for action in actions] == ["rolled"] * (len(actions) - 1) + ["stopped:"]
    assert len(actions) == (4 if precision == "fp32" else 5)
    assert sum("from here on in fp32" in action for action in actions) == (0 if precision == "fp32" else 1)
    assert "Traceback" not in capsys.readouterr().err
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(directory), "--lr", "0.0001"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.002 -> 0.0001" in out
    assert "left by rollbacks, is dropped" in out
    assert "Learning rates are multiplied" not in out  # a rate given anew is meant as it is
    assert read_events(directory, "window")[-1]["precision"] == "fp32"


def test_a_launcher_that_starts_a_diverged_run_again_learns_that_it_has(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny_argv("--max-rollbacks", "0", "--drill", "nan-weight@2", "--resume", "auto")
    assert main(argv) == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main(argv) == 3
    assert "diverged before, and the same command would again" in capsys.readouterr().err
    assert main([*argv, "--lr", "0.001"]) == 0  # the drill, too, is of the first start alone


def test_without_rollbacks_windows_that_are_skipped_again_and_again_do_not_end_the_run(
    tiny_argv: Argv, tmp_path: Path
) -> None:
    flags = ("--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "2", "--max-rollbacks", "0")
    assert main(tiny_argv(*flags, "--drill", "spike@6x12")) == 0
    assert read_events(tmp_path / "run", "run_end")[0]["recovery"]["skipped"]["spike"] >= 8


def test_single_sample_in_the_very_first_window_is_quarantined_and_nothing_rolled_back(
    tiny_argv: Argv, tmp_path: Path
) -> None:
    flags = ("--batch-size", "1", "--accumulation-steps", "1", "--epochs", "1", "--stage1-epochs", "1")
    assert main(tiny_argv(*flags, "--drill", "bad-sample@1")) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert incident["action"].startswith("quarantined until epoch 4")
    recovery = read_events(tmp_path / "run", "run_end")[0]["recovery"]
    assert (recovery["rollbacks"], recovery["lr_factor"]) == (0, 1.0)


def test_statistic_that_is_not_finite_is_found_before_anything_is_saved(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm in training does not look at its running variance: nothing else would show it."""
    run: list[Run] = []
    original = train_ultimate.prepare
    monkeypatch.setattr(train_ultimate, "prepare", lambda argv: run.append(original(argv)) or run[0])
    step = train_ultimate.gated_step

    def corrupting(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        step(optimizer, skip)
        if run[0].state.progress.global_window == 9:
            next(b for n, b in run[0].state.model.named_buffers() if n.endswith("running_var")).fill_(torch.inf)

    monkeypatch.setattr(train_ultimate, "gated_step", corrupting)
    assert main(tiny_argv()) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert (incident["verdict"], incident["cause"]) == ("nonfinite_weights", "model")


def test_initial_weights_that_are_not_finite_are_refused(
    tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builders.build_network

    def broken(*args: Any, **options: Any) -> CamouflageSegmenter:
        model = original(*args, **options)
        next(model.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(builders, "build_network", broken)
    assert main(tiny_argv()) == 2
    assert "initial weights are not finite" in capsys.readouterr().err


# fp16


@pytest.mark.parametrize("weakness", [large_activations], indirect=True)
@pytest.mark.usefixtures("weakness")
def test_values_beyond_fp16_are_run_again_in_fp32_and_nothing_is_quarantined(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = with_flat_image(tiny_dataset, tmp_path / "data")
    assert main(tiny_argv("--dataset-path", str(root), "--precision", "fp16")) == 0
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
    assert main(["replay", str(elsewhere)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^replayed, fp16 +nan", out, re.MULTILINE)
    assert re.search(r"^replayed, fp32 +\d\.\d+ .*none$", out, re.MULTILINE)
    assert "Cause: precision: it is finite in fp32" in out


def test_the_crash_the_project_began_with(
    undisturbed: Callable[[str], Path], tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 at full rate, an fp16 scale of 2^16, and an infinite norm at batch 5: the bare loop raises there.

    Ours finishes, and its loss in each epoch is within 2 % of fp32's without the fault.
    """
    monkeypatch.setattr(builders, "CONSERVATIVE_SCALER", ScalerSettings(init_scale=2.0**16))
    same = ("--stage2-lr-scale", "1", "--accumulation-steps", "1")  # ten windows an epoch, of which one is lost
    flags = (*same, "--precision", "fp16", "--drill", "inf-grad@25")
    assert main(tiny_argv(*flags)) == 0
    windows = read_events(tmp_path / "run", "window")
    assert windows[20]["loss_scale"] == 2.0**16
    assert {entry["verdict"] for entry in windows} == {"applied", "overflow"}
    assert main(tiny_argv(*same, checkpoint_dir=tmp_path / "fp32")) == 0
    ours = [event["loss"] for event in read_events(tmp_path / "run", "epoch")]
    reference = [event["loss"] for event in read_events(tmp_path / "fp32", "epoch")]
    assert ours == pytest.approx(reference, rel=0.02)
    with pytest.raises(RuntimeError, match="non-finite"):
        bare_loop(prepare(tiny_argv(*flags, checkpoint_dir=tmp_path / "bare")))


def bare_loop(run: Run) -> None:
    """Stage 2 as it is usually written, with ``error_if_nonfinite``; one gradient is infinite at batch 5."""
    model = run.state.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.args.lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    loader = training_loader(run.train_pairs, 64, 2, run.args.seed, num_workers=0, pin_memory=False)
    for number, batch in enumerate(loader, start=1):
        images, masks = train_ultimate.to_device(batch, run.device, run.memory_format)
        with run.precision.autocast():
            outputs = model(images)
        scaler.scale(deep_supervision_loss(outputs, masks, 0.0)).backward()
        if number == 5:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
