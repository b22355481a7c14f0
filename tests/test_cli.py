"""The command line: what was typed and only that, in the words of the documents."""

import re
import subprocess
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import ROOT, Argv, train
from test_settings import FROZEN

from commands import cli
from training.settings import CHOICES, DEMO_DEFAULTS, Settings, UsageError


def resolved(argv: list[str]) -> Settings:
    request = cli.parse(argv)
    return Settings.resolve(request.given, preset=request.preset)


def test_flags_of_train_have_the_frozen_defaults() -> None:
    settings = resolved(["train", "--dataset-path", "somewhere"]).to_dict()
    assert settings.pop("num_workers") is None is settings.pop("threads")
    assert settings == {**FROZEN, "dataset_path": "somewhere"}


@pytest.mark.parametrize("entry", fields(Settings), ids=lambda entry: entry.name)
@pytest.mark.parametrize("command", ["train", "demo"])
def test_every_setting_has_a_flag(command: str, entry: Field[Any]) -> None:
    flag, kind = "--" + entry.name.replace("_", "-"), entry.type
    if kind is bool:
        assert cli.parse([command, flag]).given[entry.name] is True
        assert cli.parse([command, "--no-" + flag[2:]]).given[entry.name] is False
        return
    samples = {str: "text", int: 64, float: 0.5}
    if kind == list[float]:
        words, expected = ["0.5", "2"], [0.5, 2.0]
    elif kind == list[str]:
        words, expected = ["text"], ["text"]
    else:
        expected = CHOICES[entry.name][-1] if entry.name in CHOICES else samples[(*get_args(kind), kind)[0]]
        words = [str(expected)]
    assert cli.parse([command, flag, *words]).given[entry.name] == expected


def test_a_request_holds_only_what_was_typed_and_the_folder() -> None:
    request = cli.parse(["train", "--lr", "0.1"])
    assert (request.command, request.given) == ("train", {"lr": 0.1, "checkpoint_dir": "./checkpoints"})
    assert request.preset == {}


def test_the_list_of_flags_has_each_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(--[a-z0-9-]+)[^`]*` \| ([^|]*) \|", (ROOT / "docs" / "flags.md").read_text(), flags=re.MULTILINE
    )
    documented = {flag[2:].replace("-", "_"): default.strip().strip("`") for flag, default in rows}
    assert documented.keys() == {*FROZEN, "num_workers", "threads"}
    for name, default in FROZEN.items():
        if isinstance(default, list):
            default = " ".join(f"{value:g}" for value in default) or None
        if default is not None and not isinstance(default, bool):
            assert documented[name] == str(default), name


def test_settings_by_budget_in_the_readme_are_accepted() -> None:
    text = (ROOT / "README.md").read_text().split("### Settings by budget")[1].split("###")[0]
    rows = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \|", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for flags in rows:
        resolved(["train", "--dataset-path", "somewhere", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "argument --batch-size: must be at least 1, not 0"),
        (["--batch-size", "two"], "argument --batch-size: 'two' is not a whole number"),
        (["--zoom", "0.1"], "argument --zoom: must be at least 0.25 and at most 4, not 0.1"),
        (["--lr", "0"], "argument --lr: must be above 0, not 0"),
        (["--lr", "nan"], "argument --lr: must be above 0, not nan"),
        (["--lr", "inf"], "argument --lr: must be above 0, not inf"),
        (["--val-fraction", "1"], "argument --val-fraction: must be above 0 and at most 0.9, not 1"),
        (["--weight-decay", "-1"], "argument --weight-decay: must be at least 0, not -1"),
        (["--ema-decay", "1"], "--ema-decay must be below 1"),
        (["--stage1-epochs", "200"], "--stage1-epochs 200 is more than --epochs 140"),
        (["--img-size", "350"], "--img-size 350 is not a multiple of 32, a backbone's coarsest stride; try 352"),
        (["--frozen-levels", "1", "--no-pretrained"], "--frozen-levels keeps layers as they were pretrained"),
        (["--decoder-channels", "60"], "--decoder-channels 60 is not a multiple of 8"),
        (["--img-size", "32"], "argument --img-size: must be at least 64, not 32"),
        (["--seed", str(2**63)], "argument --seed: must be at most 9223372036854775807"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (
            ["--epoch", "3"],
            "unrecognized arguments: --epoch 3; did you mean --epochs? (see train_ultimate.py train --help",
        ),
        (["--stage1-epochs", "20", "--epochs", "10"], "--stage1-epochs 20 is more than --epochs 10, the sum of both"),
    ],
)
def test_mistakes_are_explained_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        resolved(["train", "--dataset-path", "somewhere", *flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "way"),
    [
        ("tflite", "choose from onnx, torch, safetensors. TFLite files are made from an ONNX file by other programs: "),
        ("TensorRT", "TensorRT starts from an ONNX file"),
        ("jpeg", "no such format: 'jpeg'; choose from onnx, torch, safetensors (see"),
    ],
)
def test_a_format_of_export_that_is_missing_is_answered_with_the_way_to_it(form: str, way: str) -> None:
    with pytest.raises(UsageError) as error:
        cli.parse(["export", "--checkpoint", "a.pth", "--format", form])
    assert way in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flag_before_the_command_is_refused() -> None:
    with pytest.raises(UsageError, match="--dataset-path: the command comes first, one of train, demo"):
        cli.parse(["--dataset-path", "x", "train"])


def test_a_folder_stands_for_the_best_weights_in_it(tmp_path: Path) -> None:
    args = cli.parse(["predict", "--checkpoint", str(tmp_path), "a.jpg", "--output", "b"]).args
    assert Path(args.checkpoint) == tmp_path / "best_model.pth"


def test_demo_is_train_with_other_defaults_and_its_own_folder() -> None:
    demo = cli.parse(["demo", "--epochs", "5"])
    assert (demo.preset, cli.parse(["train"]).preset) == (DEMO_DEFAULTS, {})
    assert demo.given["epochs"] == 5
    assert demo.given["checkpoint_dir"].startswith("demo-runs/")
    settings = resolved(["demo", "--epochs", "5"])
    assert (settings.dataset_path, settings.pretrained, settings.epochs) == ("synthetic", False, 5)


def test_demo_rehearses_two_faults_unless_others_are_asked_for_or_it_is_resumed() -> None:
    assert resolved(["demo"]).drill == ["bad-sample@100", "spike@200"]
    assert resolved(["demo", "--drill", "kill@3"]).drill == ["kill@3"]
    assert resolved(["demo", "--resume", "auto"]).drill == []
    assert resolved(["train", "--dataset-path", "x"]).drill == []


def test_resuming_a_file_goes_on_in_its_folder_unless_another_is_given() -> None:
    def folder(*flags: str) -> str:
        return cli.parse(["train", *flags]).given["checkpoint_dir"]

    assert folder("--resume", "runs/a/epoch_0003.pth") == str(Path("runs/a"))
    assert folder("--resume", "auto") == "./checkpoints"
    assert folder("--resume", "runs/a/x.pth", "--checkpoint-dir", "b") == "b"


COUNTING = """
import runpy, sys
from commands import cli

parse, calls = cli.parse, 0

def counted(argv):
    global calls
    calls += 1
    return parse(argv)

cli.parse = counted
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("parsed", calls)
"""


@pytest.mark.slow
def test_a_process_parses_its_command_line_once(tiny_argv: Argv, tiny_dataset: Path, tmp_path: Path) -> None:
    resume = [*tiny_argv("--epochs", "1", "--stage1-epochs", "1"), "--resume", "auto"]
    assert train(resume) == 0
    evaluate = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--dataset-path", str(tiny_dataset)]
    for argv in (resume, [*evaluate, "--device", "cpu"]):
        command = [sys.executable, "-c", COUNTING, "train_ultimate.py", *argv]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "parsed 1"
