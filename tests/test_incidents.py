import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from training import incidents
from training.batchnorm import running_statistics, untouched
from training.diagnosis import Diagnosis, diagnose, find_culprits, name_cause, stand_out
from training.incidents import IncidentRecord, IncidentStore, read_incident


class DividesByZero(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values / torch.zeros_like(values)


class InfiniteGradient(nn.Module):
    """sqrt at 0: the value is finite, its derivative is not."""

    def forward(self, values: Tensor) -> Tensor:
        return (values * 0).sqrt() + values


def backward(model: nn.Module, inputs: Tensor) -> Tensor:
    loss = model(inputs).square().mean()
    loss.backward()
    return loss.detach()


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), *middle, nn.Linear(4, 2))


def test_first_non_finite_module_of_the_forward_pass_is_named() -> None:
    model = network(DividesByZero())
    diagnosis = diagnose(model, lambda: backward(model, torch.randn(3, 4)))
    assert diagnosis.first_nonfinite == "2 (output, from an input that is finite)"
    assert not diagnosis.finite
    assert all(parameter.grad is None for parameter in model.parameters())


def test_input_that_is_not_finite_is_told_from_a_module_that_is_at_fault() -> None:
    model = network()
    diagnosis = diagnose(model, lambda: backward(model, torch.full((3, 4), math.nan)))
    assert diagnosis.first_nonfinite == "0 (output, from an input that is not finite itself)"


def test_first_non_finite_gradient_is_named_also_behind_in_place_activations() -> None:
    model = network(InfiniteGradient())
    diagnosis = diagnose(model, lambda: backward(model, torch.randn(3, 4)))
    assert math.isfinite(diagnosis.loss)
    assert not math.isfinite(diagnosis.grad_norm)
    assert diagnosis.first_nonfinite == "1 (gradient at its output)"


def test_loss_alone_can_be_at_fault() -> None:
    model = network()
    diagnosis = diagnose(model, lambda: backward(model, torch.randn(3, 4)) * math.nan)
    assert diagnosis.first_nonfinite.startswith("the loss itself")


def test_finite_window_has_norms_of_unscaled_gradients_and_no_culprit() -> None:
    model, inputs = network(), torch.randn(3, 4)

    def scaled() -> Tensor:
        loss = model(inputs).square().mean()
        (loss * 1024).backward()
        return loss.detach()

    backward(model, inputs)
    expected = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    diagnosis = diagnose(model, scaled, loss_scale=1024)
    assert diagnosis.finite
    assert diagnosis.first_nonfinite == ""
    assert diagnosis.worst_parameters == pytest.approx(expected)
    assert list(diagnosis.worst_parameters.values()) == sorted(diagnosis.worst_parameters.values(), reverse=True)
    assert diagnosis.grad_norm == pytest.approx(math.hypot(*expected.values()))


def test_ten_worst_parameters_the_infinite_ones_first() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))

    def explode() -> Tensor:
        loss = backward(model, torch.randn(3, 4))
        model[3].weight.grad[0, 0] = math.inf  # type: ignore[index]
        return loss

    diagnosis = diagnose(model, explode)
    assert len(diagnosis.worst_parameters) == 10
    assert next(iter(diagnosis.worst_parameters)) == "3.weight"
    assert diagnosis.first_nonfinite == "gradient of 3.weight"


def test_untouched_puts_buffers_back() -> None:
    model = nn.BatchNorm1d(4).train()
    before = [buffer.clone() for buffer in model.buffers()]
    with untouched(model):
        model(torch.randn(8, 4) + 3)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_every_culprit_is_found_and_nothing_else(case: tuple[int, set[int]]) -> None:
    num_samples, bad = case
    runs = 0

    def is_bad(positions: Sequence[int]) -> bool:
        nonlocal runs
        runs += 1
        return bool(bad & set(positions))

    assert find_culprits(num_samples, is_bad) == sorted(bad)
    assert runs <= 1 + 2 * len(bad) * math.ceil(math.log2(num_samples) + 1)


def test_samples_that_are_only_bad_together_are_not_blamed() -> None:
    assert find_culprits(8, lambda positions: {2, 5} <= set(positions)) == []


def test_sample_far_above_the_others_stands_out() -> None:
    assert stand_out([1.0, 2.0, 1.5, 40.0]) == [3]
    assert stand_out([1.0, 2.0, 1.5, 9.0]) == []
    assert stand_out([5.0]) == []


fine, broken = Diagnosis(1.0, 1.0, ""), Diagnosis(math.nan, math.nan, "head")


@pytest.mark.parametrize(
    ("recorded", "full", "culprits", "healthy_otherwise", "cause"),
    [
        (broken, fine, [], True, "precision"),
        (broken, broken, [3], False, "data"),
        (broken, broken, [0, 1, 2, 3, 4, 5, 6, 7], False, "model"),
        (broken, broken, [0, 1, 2, 3, 4, 5, 6, 7], True, "data"),
        (broken, broken, [], True, "data"),  # together, yet not alone
        (broken, broken, [], False, "model"),
        (broken, broken, [3], None, "data"),
        (broken, broken, [0, 1, 2, 3, 4, 5, 6, 7], None, "model"),
        (fine, fine, [], True, "not reproduced"),
    ],
)
def test_cause(
    recorded: Diagnosis, full: Diagnosis, culprits: list[int], healthy_otherwise: bool | None, cause: str
) -> None:
    assert name_cause(recorded, full, culprits, 8, healthy_otherwise) == cause


def test_single_sample_is_given_the_blame_unless_the_weights_are_known_to_have_it() -> None:
    assert [name_cause(broken, broken, [0], 1, healthy) for healthy in (None, True, False)] == ["data", "data", "model"]


# Folders


def record(**changes: Any) -> IncidentRecord:
    values: dict[str, Any] = {
        **{"verdict": "nonfinite_loss", "stage": 2, "epoch": 3, "window": 7, "loss": math.nan, "grad_norm": math.inf},
        **{"loss_scale": 1.0, "precision": "bf16", "samples": ["Imgs/a.jpg"]},
    }
    return IncidentRecord(**{**values, **changes})


def test_incident_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path / "incidents")
    folder = store.open(record(), {"model": {"weight": torch.tensor([1.0, math.nan])}})
    assert folder.name == "000001"
    assert store.open(record(), {}).name == "000002"
    again, payload = read_incident(folder)
    assert math.isnan(again.loss)
    assert again.grad_norm == math.inf
    assert again.samples == ["Imgs/a.jpg"]
    assert payload["model"]["weight"][0] == 1
    assert json.loads((folder / "incident.json").read_text())["loss"] == "nan"


def test_newest_incidents_are_kept(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, most=5)
    for _ in range(12):
        store.open(record(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:06d}" for number in range(8, 13)]


def test_total_size_is_bounded_by_dropping_old_payloads_and_the_records_stay(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_bytes=8 * 2**20)
    folders = [store.open(record(), {"model": torch.zeros(500_000)}) for _ in range(5)]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) <= 8 * 2**20
    assert len(list(tmp_path.glob("*/incident.json"))) == 5
    assert [path.parent.name for path in sorted(tmp_path.glob("*/replay.pt"))] == ["000004", "000005"]
    read_incident(folders[-1])
    with pytest.raises(ValueError, match="removed to make room"):
        read_incident(tmp_path / "000001")


def test_payload_that_is_too_large_is_not_written_and_removes_no_other(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_bytes=5_000_000)
    small = store.open(record(), {"model": torch.zeros(10)})
    large = store.open(record(), {"model": torch.zeros(2_000_000)})
    assert [path.name for path in large.iterdir()] == ["incident.json"]
    read_incident(small)
    with pytest.raises(ValueError, match="too large to keep"):
        read_incident(large)


def test_leftover_of_a_killed_write_is_removed(tmp_path: Path) -> None:
    folder = IncidentStore(tmp_path).open(record(), {})
    leftover = folder / ".replay.pt.unfinished"
    leftover.write_bytes(b"half")
    IncidentStore(tmp_path)
    assert not leftover.exists()
    read_incident(folder)


def test_disk_that_fills_up_in_mid_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr(torch, "save", half)
    folder = IncidentStore(tmp_path).open(record(), {})
    assert [path.name for path in folder.iterdir()] == ["incident.json"]
    assert "cannot be replayed later" in capsys.readouterr().out


def test_samples_are_looked_at_by_themselves_where_batchnorm_would_mix_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()).train()
    model[2].eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 4))
    with running_statistics(model):
        model(torch.randn(1, 4))
    assert [module.training for module in model] == [True, True, False]


def test_full_disk_costs_the_folder_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(incidents, "write_json", full)
    IncidentStore(tmp_path).open(record(), {})
    out = capsys.readouterr().out
    assert out.count("Warning") == 2
    assert "No space left on device" in out


def test_folders_that_are_no_incidents_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no incident\.json there"):
        read_incident(tmp_path)
    (tmp_path / "incident.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record of this program"):
        read_incident(tmp_path)
    folder = IncidentStore(tmp_path / "store").open(record(), {})
    (folder / "replay.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"replay\.pt: not readable"):
        read_incident(folder)
    torch.save({"weights": 1}, folder / "replay.pt")
    with pytest.raises(ValueError, match="not written by this program"):
        read_incident(folder)
