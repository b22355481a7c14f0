import re
from pathlib import Path

import pytest

from commands import cli
from data import processes
from training import settings

# Other programs rely on these names and defaults: a change here is a breaking change.
FROZEN = {
    "dataset_path": None, "include_noncam": False, "exclude": None, "img_size": 384, "val_fraction": 0.1,
    "cache": False, "cache_dir": None,
    "backbone": "pvt_v2_b2", "pretrained": True, "backbone_weights": None, "frozen_levels": 0, "decoder_channels": 64,
    "zoom": [1.0], "multi_scale": [1.0],
    "epochs": 140, "stage1_epochs": 30, "batch_size": 2, "accumulation_steps": 4, "lr": 0.00025,
    "stage2_lr_scale": 0.5, "backbone_lr_scale": 0.1, "weight_decay": 1e-4, "ema_decay": 0.999,
    "grad_clip": 0.5, "spike_policy": "skip", "max_rollbacks": 3, "drill": [],
    "precision": "auto", "seed": 42, "deterministic": False,
    "resume": None, "checkpoint_dir": "./checkpoints", "keep_checkpoints": 3, "checkpoint_every": 0,
    "device": "auto", "rank_timeout": 60.0, "shard": False, "quiet": False, "json_logs": False,
    "augment_on": "loader", "channels_last": True, "compile": False, "gradient_checkpointing": False,
}  # fmt: skip


def test_flags_and_defaults_are_frozen() -> None:
    settings = vars(cli.parse(["train", "--dataset-path", "somewhere"]))
    assert settings.pop("num_workers") is None  # of the machine: one for each core but one
    assert 1 <= processes.default_num_workers() <= 8
    assert settings.pop("command") == "train"
    assert settings == {**FROZEN, "dataset_path": "somewhere"}


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 32)
    assert processes.default_num_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes.default_num_workers() == 3


def test_the_list_of_flags_has_each_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(--[a-z0-9-]+)[^`]*` \| ([^|]*) \|",
        (Path(__file__).parents[1] / "docs" / "flags.md").read_text(),
        flags=re.MULTILINE,
    )
    documented = {flag[2:].replace("-", "_"): default.strip().strip("`") for flag, default in rows}
    assert documented.keys() == {*FROZEN, "num_workers"}
    for name, default in FROZEN.items():
        if isinstance(default, list):
            default = " ".join(f"{value:g}" for value in default) or None
        if default is not None and not isinstance(default, bool):
            assert documented[name] == str(default), name


def test_settings_by_budget_in_the_readme_are_accepted() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text().split("### Settings by budget")[1].split("###")[0]
    rows = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \|", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for flags in rows:
        settings.check(cli.parse(["train", "--dataset-path", "somewhere", *flags.split()]))


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
def test_mistakes_are_told_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(cli.UsageError) as error:
        settings.check(cli.parse(["train", "--dataset-path", "somewhere", *flags]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fewer_epochs_have_a_shorter_first_stage() -> None:
    for epochs, stage1 in ((140, 30), (300, 30), (70, 15), (10, 2), (1, 0)):
        assert cli.parse(["train", "--dataset-path", "x", "--epochs", str(epochs)]).stage1_epochs == stage1
    assert cli.parse(["train", "--resume", "auto", "--epochs", "20"], saved_settings()).stage1_epochs == 11
    assert cli.parse(["train", "--dataset-path", "x", "--epochs", "10", "--stage1-epochs", "7"]).stage1_epochs == 7


def test_a_flag_before_the_command_is_told() -> None:
    with pytest.raises(cli.UsageError, match="--dataset-path: the command comes first, one of train, demo"):
        cli.parse(["--dataset-path", "x", "train"])


def test_a_folder_stands_for_the_best_weights_in_it(tmp_path: Path) -> None:
    args = cli.parse(["predict", "--checkpoint", str(tmp_path), "a.jpg", "--output", "b"])
    assert Path(args.checkpoint) == tmp_path / "best_model.pth"


def test_data_set_is_needed_unless_resuming() -> None:
    with pytest.raises(cli.UsageError, match="--dataset-path is needed"):
        settings.check(cli.parse(["train"]))
    settings.check(cli.parse(["train", "--resume", "auto"], saved_settings()))


def test_demo_is_train_with_other_defaults_and_a_folder_of_its_own() -> None:
    demo, train = cli.parse(["demo", "--epochs", "5"]), cli.parse(["train", "--dataset-path", "x"])
    assert vars(demo).keys() == vars(train).keys()
    assert (demo.dataset_path, demo.pretrained, demo.epochs) == ("synthetic", False, 5)
    assert demo.checkpoint_dir.startswith("demo-runs/")


def test_demo_rehearses_two_faults_unless_others_are_asked_for_or_it_is_resumed() -> None:
    assert cli.parse(["demo"]).drill == ["bad-sample@100", "spike@200"]
    assert cli.parse(["demo", "--drill", "kill@3"]).drill == ["kill@3"]
    assert cli.parse(["demo", "--resume", "auto"]).drill == []
    assert cli.parse(["train", "--dataset-path", "x"]).drill == []


def test_resuming_a_file_goes_on_in_its_folder_unless_told_otherwise() -> None:
    assert cli.parse(["train", "--resume", "runs/a/epoch_0003.pth"]).checkpoint_dir == str(Path("runs/a"))
    assert cli.parse(["train", "--resume", "auto"]).checkpoint_dir == "./checkpoints"
    assert cli.parse(["train", "--resume", "runs/a/x.pth", "--checkpoint-dir", "b"]).checkpoint_dir == "b"


def saved_settings() -> dict[str, object]:
    flags = ["--lr", "0.1", "--epochs", "50", "--checkpoint-dir", "old", "--no-pretrained"]
    return vars(cli.parse(["train", "--dataset-path", "photos", *flags]))


def test_resumed_settings_take_the_place_of_defaults_and_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli.parse(["train", "--resume", "auto", "--lr", "0.05"], saved_settings())
    assert (args.dataset_path, args.lr, args.epochs, args.pretrained) == ("photos", 0.05, 50, False)
    assert (args.resume, args.checkpoint_dir) == ("auto", "./checkpoints")  # of this invocation, not of the run
    assert capsys.readouterr().out == "lr: 0.1 -> 0.05\n"


def test_what_is_settled_at_the_start_is_ignored_on_resume_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pretrained", "--val-fraction", "0.5"]
    args = cli.parse(["train", "--resume", "auto", *flags], saved_settings())
    assert (args.pretrained, args.val_fraction) == (False, 0.1)
    out = capsys.readouterr().out
    assert "Ignored --pretrained" in out
    assert "Ignored --val-fraction" in out


def test_backbone_and_decoder_cannot_change_on_resume() -> None:
    with pytest.raises(cli.UsageError, match="--backbone resnet18: the checkpoint was trained with pvt_v2_b2"):
        cli.parse(["train", "--resume", "auto", "--backbone", "resnet18"], saved_settings())
    with pytest.raises(cli.UsageError, match="--decoder-channels 32"):
        cli.parse(["train", "--resume", "auto", "--decoder-channels", "32"], saved_settings())


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_processors_counts(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    bound = processes.num_cores(tmp_path / "none")
    assert bound >= 1
    assert processes.num_cores(tmp_path) == (bound if limit is None else min(bound, limit))
