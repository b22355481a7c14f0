"""The step gate: verdicts, steps that are skipped without a trace, and the detection of spikes."""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import Argv, train
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import read_events
from torch import nn

from runtime.machine import Precision, ScalerSettings
from runtime.ranks import Ranks
from training.gate import (
    DeviceVerdict,
    PendingOutcome,
    SpikeDetector,
    StepGate,
    StepVerdict,
    WindowOutcome,
    clip_gradients_,
    gated_step,
    should_skip,
)
from training.ladder import Action, Ladder

numbers = st.sampled_from([0.0, 1.5, 1e30, math.inf, -math.inf, math.nan])


FORMS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single tensor": {"foreach": False},
}


def trained_model(kind: str) -> tuple[nn.Linear, torch.optim.AdamW]:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **FORMS[kind])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@settings(deadline=None)
@given(
    poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e38]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(list(FORMS)),
)
def test_skipped_step_leaves_weights_moments_and_step_count_bitwise_unchanged(
    poison: float, seed: int, kind: str
) -> None:
    torch.manual_seed(seed)
    model, optimizer = trained_model(kind)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    gated_step(optimizer, skip=torch.ones(()))
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for index, moments in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][index][name]) for name, value in moments.items())


@pytest.mark.parametrize("kind", ["fused", "foreach", "single tensor"])
def test_applied_step_is_the_optimizers_own(kind: str) -> None:
    torch.manual_seed(0)
    model, optimizer = trained_model(kind)
    reference = copy.deepcopy(model)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, **FORMS[kind])
    reference_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module in (model, reference):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    gated_step(optimizer, skip=torch.zeros(()))
    reference_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def outcome(loss: float, grad_norm: float, found_inf: float, spike: float, scale: float) -> WindowOutcome:
    """Return what the host makes of a window's numbers; its spike limit is 7."""
    values = [torch.tensor(value) for value in (loss, grad_norm, found_inf, spike, 7.0, scale, 1.0, 0.0)]
    return PendingOutcome(DeviceVerdict(*values, requests=None)).read()


flags = st.sampled_from([0.0, 1.0])


@given(loss=numbers, grad_norm=numbers, found_inf=flags, spike=flags, scale=st.sampled_from([1.0, 1024.0]))
def test_a_window_is_applied_on_the_device_exactly_when_the_host_calls_it_applied(
    loss: float, grad_norm: float, found_inf: float, spike: float, scale: float
) -> None:
    verdict = outcome(loss, grad_norm, found_inf, spike, scale).verdict
    values = [torch.tensor(value) for value in (loss, grad_norm, found_inf, spike)]
    assert (should_skip(*values).item() == 0) == (verdict is StepVerdict.APPLIED)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "found_inf", "spike", "scale", "verdict"),
    [
        (1.0, 2.0, 0.0, 0.0, 1024.0, StepVerdict.APPLIED),
        (1.0, 2.0, 0.0, 1.0, 1024.0, StepVerdict.SPIKE),
        (1.0, math.inf, 1.0, 0.0, 1024.0, StepVerdict.OVERFLOW),
        (1.0, math.nan, 1.0, 0.0, 2.0, StepVerdict.OVERFLOW),
        (1.0, math.inf, 1.0, 0.0, 1.0, StepVerdict.NONFINITE_GRAD),  # the scale is at its floor
        (1.0, math.inf, 0.0, 0.0, 1024.0, StepVerdict.NONFINITE_GRAD),  # finite gradients of infinite norm
        (math.nan, math.nan, 1.0, 0.0, 1024.0, StepVerdict.NONFINITE_LOSS),
        (math.inf, 2.0, 0.0, 0.0, 1.0, StepVerdict.NONFINITE_LOSS),
    ],
)
def test_verdicts(
    loss: float, grad_norm: float, found_inf: float, spike: float, scale: float, verdict: StepVerdict
) -> None:
    found = outcome(loss, grad_norm, found_inf, spike, scale)
    assert found.verdict is verdict
    assert (found.loss_scale, found.spike_limit) == (scale, 7.0)


def judged(gate: StepGate, loss: float, grad_norm: float) -> DeviceVerdict:
    """Return the verdict on a window in fp32."""
    scaler = Precision("fp32", "cpu").new_scaler(ScalerSettings())
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return gate.judge(torch.tensor(loss), torch.tensor(grad_norm), scaler, optimizer, num_samples=6)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "applied"), [(1.0, 1.0, True), (math.nan, 1.0, False), (1.0, 50.0, False)]
)
def test_gate_undoes_the_statistics_of_exactly_the_windows_it_does_not_apply(
    loss: float, grad_norm: float, applied: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    gate = StepGate(model, detector_with_history(), 0.5, Ranks(), lambda: [])
    gate.begin_window()
    before = copy.deepcopy(list(model.buffers()))
    model(torch.randn(8, 4) + 5)
    verdict = judged(gate, loss, grad_norm)
    gate.end_window(verdict.skip)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert (verdict.skip.item() == 0, unchanged) == (applied, not applied)


@pytest.mark.parametrize(("grad_clip", "clipped_to"), [(0.5, 0.5), (100.0, 2.1)])
def test_gradients_are_clipped_to_the_threshold_and_those_of_outliers_further(
    grad_clip: float, clipped_to: float
) -> None:
    """The history is log-normal around 1, and exp(2.5 x 0.3) is 2.1."""
    gate = StepGate(nn.Identity(), detector_with_history(policy="clip"), grad_clip, Ranks(), lambda: [])
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    clip_gradients_([parameter], judged(gate, 1.0, 50.0), grad_clip)
    assert parameter.grad.norm().item() == pytest.approx(clipped_to, rel=0.1)


def examine(
    detector: SpikeDetector, norm: float, loss: float = 1.0, found_inf: float = 0.0
) -> tuple[bool, float, float]:
    """Return whether the norm is a spike, the norm to clip to, and the limit."""
    spike, highest, limit = detector.examine(torch.tensor(loss), torch.tensor(norm), torch.tensor(found_inf))
    return bool(spike), highest.item(), limit.item()


def detector_with_history(windows: int = 200, policy: Literal["skip", "clip", "off"] = "skip") -> SpikeDetector:
    """Return a detector that has seen log-normal norms around 1, of deviation 0.3."""
    generator = torch.Generator().manual_seed(0)
    detector = SpikeDetector(policy, torch.device("cpu"))
    for value in torch.randn(windows, generator=generator).mul(0.3).exp().tolist():
        examine(detector, value)
    return detector


def test_spike_is_found_and_an_ordinary_norm_is_not() -> None:
    detector = detector_with_history()
    assert examine(detector, 2.0)[0] is False
    assert examine(detector, 20.0)[0] is True
    assert examine(detector, 1.0)[0] is False


def test_height_of_the_clip_tier_lies_between_ordinary_norms_and_spikes() -> None:
    highest = examine(detector_with_history(), 1.0)[1]
    assert 1.7 < highest < 2.7  # exp(2.5 x 0.3) = 2.1
    assert examine(detector_with_history(windows=10), 1.0)[1] == math.inf


def test_during_warm_up_ten_times_the_largest_so_far_is_a_spike() -> None:
    detector = SpikeDetector("skip", torch.device("cpu"))
    assert [examine(detector, norm)[0] for norm in (1.0, 2.0, 1.5, 1.0, 19.0)] == [False] * 5
    assert examine(detector, 200.0)[0] is True


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("level_before", [None, 1.0, 300.0])
def test_a_gradient_far_too_large_is_a_spike_in_a_stage_s_first_windows_too(
    number: int, level_before: float | None
) -> None:
    """The level may rise tenfold from one stage to the next, and the first norms of a stage may scatter by more."""
    detector = SpikeDetector("skip", torch.device("cpu"))
    level = level_before or 1.0
    if level_before is not None:
        assert not any(examine(detector, level)[0] for _ in range(100))
        detector.reset(torch.device("cpu"))
    first = [10 * level, 0.02 * level, 80 * level, 3 * level]
    assert not any(examine(detector, norm)[0] for norm in first[: number - 1])
    assert examine(detector, 1e4 * 10 * level)[0] is True
    assert not any(examine(detector, norm)[0] for norm in first)


def test_norms_of_another_scale_are_accepted_from_the_fourth_window_on() -> None:
    detector = SpikeDetector("skip", torch.device("cpu"))
    assert [examine(detector, 5000.0)[0] for _ in range(100)] == [True] * 3 + [False] * 97
    assert examine(detector, 5e5)[0] is True


@given(bad=st.sampled_from([math.nan, math.inf]), windows=st.sampled_from([0, 3, 100]))
def test_a_window_that_is_not_finite_does_not_enter_the_statistics(bad: float, windows: int) -> None:
    detector = detector_with_history(windows)
    before = detector.state_dict()["statistics"].tolist()
    for arguments in ({"norm": bad}, {"norm": 1.0, "loss": bad}, {"norm": 1.0, "found_inf": 1.0}):
        assert examine(detector, **arguments)[0] is False
        assert detector.state_dict()["statistics"].tolist() == before
    assert all(math.isfinite(value) for value in before)


def norms_around(level: float, windows: int, deviation: float, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(windows, generator=generator).mul(deviation).exp() * level).tolist()


def skipped_and_rolled_back(norms: Sequence[float]) -> tuple[int, int]:
    """Return how many windows with these norms are skipped, and how many rollbacks the ladder orders for it."""
    detector, ladder, num_rollbacks = SpikeDetector("skip", torch.device("cpu")), Ladder(), 0
    for norm in norms:
        verdict = StepVerdict.SPIKE if examine(detector, norm)[0] else StepVerdict.APPLIED
        if ladder.next_action(WindowOutcome(verdict, 1.0, norm, 1.0), 0, "fp32") is Action.ROLL_BACK:
            ladder.rolled_back(0.0)
            num_rollbacks += 1
    return sum(ladder.skipped.values()), num_rollbacks


@pytest.mark.parametrize("windows", [5, 20, 300])
@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.3, 0.7])
@pytest.mark.parametrize("factor", [1.3, 2.0, 10.0, 100.0, 1000.0])
def test_a_level_that_rises_for_good_is_accepted_without_a_rollback(
    factor: float, deviation: float, windows: int
) -> None:
    norms = norms_around(1.0, windows, deviation) + norms_around(factor, 150, deviation, seed=1)
    num_skipped, num_rollbacks = skipped_and_rolled_back(norms)
    assert (num_skipped <= 6, num_rollbacks) == (True, 0)
    if factor <= 2:
        assert num_skipped <= 1


@pytest.mark.parametrize(("level", "windows"), [(0.0, 100), (0.0, 4), (1e-6, 4), (1e-6, 100), (1e-9, 1)])
def test_norms_that_begin_at_nothing_cost_no_rollback(level: float, windows: int) -> None:
    num_skipped, num_rollbacks = skipped_and_rolled_back([level] * windows + norms_around(1.0, 150, 0.3))
    assert (num_skipped <= 4, num_rollbacks) == (True, 0)


@pytest.mark.parametrize("growth", [1.02, 1.1, 1.26])
def test_a_level_that_rises_step_by_step_costs_no_rollback(growth: float) -> None:
    rise = [growth**number for number in range(round(math.log(300) / math.log(growth)))]
    norms = [factor * norm for factor, norm in zip(rise, norms_around(1.0, len(rise), 0.02, seed=1), strict=True)]
    assert skipped_and_rolled_back(norms_around(1.0, 200, 0.02) + norms + norms_around(300.0, 100, 0.02))[1] == 0


def test_spikes_are_found_at_the_new_level() -> None:
    detector = detector_with_history()
    verdicts = [examine(detector, norm)[0] for norm in norms_around(100.0, 50, 0.3, seed=2)]
    assert (verdicts[:3], sum(verdicts) <= 4) == ([True] * 3, True)
    assert examine(detector, 2000.0)[0] is True


def test_three_spikes_in_a_row_are_no_new_level_and_ten_thousandfold_ones_never_are() -> None:
    detector = detector_with_history()
    assert [examine(detector, norm)[0] for norm in (100.0, 100.0, 100.0, 1.0, 100.0)] == [True] * 3 + [False, True]
    assert skipped_and_rolled_back([*norms_around(1.0, 200, 0.3), *[1e4] * 8]) == (8, 1)


def test_policy_clip_skips_nothing_and_off_takes_no_notice() -> None:
    clip, off = detector_with_history(policy="clip"), detector_with_history(policy="off")
    spike, highest, _ = examine(clip, 50.0)
    assert (spike, highest < 3) == (False, True)
    assert examine(off, 50.0) == (False, math.inf, math.inf)


@pytest.mark.parametrize("policy", ["skip", "clip"])
def test_the_limit_is_the_one_a_window_was_judged_by(policy: Literal["skip", "clip"]) -> None:
    generator = torch.Generator().manual_seed(3)
    norms = torch.randn(400, generator=generator).mul(0.5).exp()
    norms[[20, 90, 200, 201, 300]] *= 60
    norms[[2, 50, 150]] = math.nan
    detector, found, above = SpikeDetector(policy, torch.device("cpu")), [], []
    for norm in norms.tolist():
        spike, _, limit = examine(detector, norm)
        found.append(spike)
        above.append(norm > limit)
    assert sum(above) >= 4
    assert found == (above if policy == "skip" else [False] * 400)


def test_the_first_limits_are_a_hundred_times_the_norm_of_an_untrained_network_then_ten_times_the_largest() -> None:
    detector = SpikeDetector("skip", torch.device("cpu"))
    limits = [examine(detector, norm)[2] for norm in (1.0, 2.0, 1.0, 1.0, 1.0)]
    assert limits == pytest.approx([1000.0] * 4 + [20.0])


def test_detector_survives_a_round_trip() -> None:
    first, second = detector_with_history(), SpikeDetector("skip", torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    for norm in (1.0, 3.0, 30.0, 0.5):
        assert examine(first, norm) == examine(second, norm)
    assert torch.equal(first.state_dict()["statistics"], second.state_dict()["statistics"])


@pytest.mark.parametrize("count", [0, 2, 100])
def test_statistics_of_older_programs_are_read(count: int) -> None:
    """They have four numbers: count, mean, variance and largest of the logarithms."""
    older, detector = detector_with_history(count), SpikeDetector("skip", torch.device("cpu"))
    detector.load_state_dict({"statistics": older.state_dict()["statistics"][:4]})
    for norm in (1.0, 2.0, 1.0, 20.0, 1e4):
        assert examine(detector, norm) == examine(older, norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "least_caught"),
    [pytest.param(0.2, 0.95, marks=pytest.mark.slow), (0.4, 0.95), pytest.param(0.7, 0.60, marks=pytest.mark.slow)],
)
def test_spikes_of_twenty_times_are_caught_and_false_alarms_are_rare(sigma: float, least_caught: float) -> None:
    generator = torch.Generator().manual_seed(1)
    norms = torch.randn(20_000, generator=generator).mul(sigma)
    where = torch.randperm(19_800, generator=generator)[:60] + 200
    norms[where] += math.log(20)
    detector = SpikeDetector("skip", torch.device("cpu"))
    found = {index for index, norm in enumerate(norms.exp().tolist()) if examine(detector, norm)[0]}
    spikes = set(where.tolist())
    assert len(found & spikes) / 60 >= least_caught
    assert len(found - spikes) / 20_000 <= 0.0005


def test_the_log_has_the_limit_that_each_window_was_judged_by(tiny_argv: Argv, tmp_path: Path) -> None:
    """Recompute limits and verdicts from the logged norms, over both stages, a spike and a rerun."""
    drills = ("--drill", "spike@8", "--drill", "nan-loss@15")
    assert train(tiny_argv("--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "1", *drills)) == 0
    windows = read_events(tmp_path / "run", "window")
    for stage in (1, 2):
        detector = SpikeDetector("skip", torch.device("cpu"))
        for window in (window for window in windows if window["stage"] == stage):
            loss, norm, logged = (float(window[name]) for name in ("loss", "grad_norm", "spike_limit"))
            spike, _, limit = examine(detector, norm, loss)
            assert logged == limit
            assert (window["verdict"] == "spike") == spike == (norm > limit)
    verdicts = Counter(window["verdict"] for window in windows)
    assert verdicts == {"applied": 19, "spike": 1, "nonfinite_loss": 1}
    num_limits = sum(math.isfinite(float(window["spike_limit"])) for window in windows)
    assert num_limits == 21
