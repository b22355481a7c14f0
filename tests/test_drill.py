"""Fire drills: every kind of fault, rehearsed in whole runs."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import Argv, differing_tensors, failing, tiny_arguments, train
from launching import read_events

import train_ultimate
from runtime.checkpoint import read_checkpoint
from training.drill import KINDS, Drill


@pytest.mark.parametrize(
    "text", ["", "nan-loss", "nan-loss@0", "nan-loss@-1", "fire@5", "spike@5x0", "spike@5x", "spike @5"]
)
def test_text_that_names_no_drill_is_refused(text: str, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    error = failing(tiny_argv("--drill", text), capsys)
    assert f"--drill {text}: not KIND@WINDOW[xCOUNT][rRANK]" in error
    assert all(kind in error for kind in KINDS)


def test_count_is_one_unless_given() -> None:
    for text, window, count in (("spike@7", 7, 1), ("spike@7x20", 7, 20)):
        drill = Drill.parse(text)
        assert (drill.kind, drill.window, drill.left) == ("spike", window, count)


FAULTS = ["nan-loss", "inf-grad", "spike", "overflow", "nan-weight", "bad-sample"]
WINDOWS_PER_EPOCH = 10  # of two images


def expected_verdict(kind: str, precision: str) -> str | None:
    """Return the verdict on the first window that is struck; None if it is applied."""
    if kind == "overflow":
        return "overflow" if precision == "fp16" else None  # without loss scaling there is nothing to overflow
    if kind == "inf-grad":
        return "overflow" if precision == "fp16" else "nonfinite_grad"  # at first, fp16 takes an inf for an overflow
    return {"spike": "spike"}.get(kind, "nonfinite_loss")


def expected_actions(kind: str, count: int, precision: str) -> set[str]:
    """Return the first words of actions that must be among those taken."""
    if count == 1:
        again = {"run again, and applied"}
        one = {"nan-loss": again, "inf-grad": again, "spike": {"skipped"}, "overflow": set()}
        if (kind, precision) == ("inf-grad", "fp16"):
            return set()  # a single overflow is routine
        return one.get(kind, {"rolled back"} if kind == "nan-weight" else {"quarantined"})
    if kind == "overflow":
        return {"run again in fp32, and applied"} if (precision, count) == ("fp16", 20) else set()
    if kind == "nan-weight":
        return {"rolled back", "stopped"} if count == 20 else {"rolled back"}
    if kind == "spike":
        return {"skipped", "rolled back"} if count == 20 else {"skipped"}
    if kind == "bad-sample":
        return {"quarantined"}
    if (kind, precision, count) == ("inf-grad", "fp16", 3):
        return set()
    return {"skipped; looked into, it was finite"} | ({"rolled back"} if (precision, count) == ("fp32", 20) else set())


def rehearse(
    dataset: Path, directory: Path, kind: str, stage: int, count: int, precision: str, epochs_per_stage: int
) -> str:
    """Run a drill at the fifth window of a stage and check what happens. Return a line for a table."""
    window = (stage - 1) * epochs_per_stage * WINDOWS_PER_EPOCH + 5
    epochs = ("--epochs", str(2 * epochs_per_stage), "--stage1-epochs", str(epochs_per_stage))
    flags = (*epochs, "--accumulation-steps", "1", "--precision", precision)
    exit_code = train(tiny_arguments(dataset, directory, *flags, "--drill", f"{kind}@{window}x{count}"))
    assert exit_code == (3 if (kind, count) == ("nan-weight", 20) else 0)
    windows = read_events(directory, "window")
    verdicts = Counter(event["verdict"] for event in windows)
    bad = [event["verdict"] for event in windows if event["verdict"] != "applied"]
    assert (bad[0] if bad else None) == expected_verdict(kind, precision)
    actions = [event["action"] for event in read_events(directory, "incident")]
    for expected in expected_actions(kind, count, precision):
        assert any(action.startswith(expected) for action in actions), f"{expected} is not among {actions}"
    saved = next(iter(directory.glob("step_*.pth")), directory / f"epoch_{2 * epochs_per_stage:04d}.pth")
    read_checkpoint(saved)  # refuses what is not finite
    if exit_code == 3:
        assert train(["train", "--resume", "auto", "--checkpoint-dir", str(directory)]) == 0
    short = Counter(action.split(":")[0].split(" by ")[0].split(" until")[0] for action in actions)
    took = ", ".join(f"{number} {action}" for action, number in short.items()) or "-"
    found = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    return f"{kind} x{count} stage {stage} {precision}: exit {exit_code}; {found}; {took}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", FAULTS)
def test_three_faults_in_a_row_in_stage_two(tiny_dataset: Path, tmp_path: Path, kind: str, precision: str) -> None:
    rehearse(tiny_dataset, tmp_path / "run", kind, 2, 3, precision, epochs_per_stage=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_in_every_count_stage_and_precision(
    tiny_dataset: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in (1, 3, 20):
        for stage in (1, 2):
            for precision in ("fp32", "bf16", "fp16"):
                row = rehearse(tiny_dataset, tmp_path / f"{count}{stage}{precision}", kind, stage, count, precision, 3)
                with capsys.disabled():
                    print(row)


@pytest.mark.slow
def test_kill_strikes_once_and_the_resumed_run_ends_in_the_same_weights(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    script = [sys.executable, train_ultimate.__file__]
    killed = subprocess.run(
        [*script, *tiny_argv("--drill", "kill@11")], capture_output=True, check=False, env=ENVIRONMENT
    )
    assert killed.returncode == -signal.SIGKILL
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert train(tiny_argv(checkpoint_dir=tmp_path / "undisturbed")) == 0
    states = [read_checkpoint(tmp_path / name / "epoch_0004.pth") for name in ("run", "undisturbed")]
    assert differing_tensors(*(state["model"] for state in states)) == []


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
