"""Simulation of runs on many GPUs, against a walk through every window and against theory."""

import dataclasses
import functools
import math
import sys

import numpy as np
import pytest

from benchmarks.cluster_simulation import (
    Cluster,
    all_reduce_exposed,
    best_interval,
    cluster_of,
    daly,
    main,
    parse,
    simulate,
    young,
)

HALF_SILENT = {"prompt": 2.0, "silent": 30.0, "silent_share": 0.5}
CLUSTER = Cluster(compute=1.0, exposed=0.1, copy=0.5, write=6.0, restart=20.0, mtbf=2000.0, **HALF_SILENT)
RELIABLE = dataclasses.replace(CLUSTER, mtbf=math.inf)
SMALL = {"runs": 200, "seed": 3}


def walk(cluster: Cluster, windows: int, interval: int, seed: int) -> float:
    """Return the seconds of one run, walked window by window with the failures of ``simulate``."""
    random = np.random.default_rng(seed)
    total, durable, outage = 0.0, 0, 0.0
    while True:
        failure = random.exponential(1.0, 1)[0] * cluster.mtbf
        detection = cluster.silent if random.random(1)[0] < cluster.silent_share else cluster.prompt
        clock, done, written = outage, durable, [(0.0, durable)]  # (end of the write, windows in it)
        while done < windows and clock <= failure:
            clock, done = clock + cluster.window, done + 1
            if (done - durable) % interval == 0 and done < windows:
                clock = max(clock, written[-1][0]) + cluster.copy
                written.append((clock + cluster.write, done))
        if clock <= failure:
            return total + clock
        total += failure + detection
        durable = max(saved for end, saved in written if end <= failure)
        outage = cluster.restart


@pytest.mark.parametrize("interval", [1, 3, 7, 50, 1000])
def test_going_from_failure_to_failure_takes_as_long_as_walking(interval: int) -> None:
    """Some intervals are shorter than a write, one is longer than the run."""
    for seed in range(30):
        for mtbf in (60.0, 400.0, math.inf):
            cluster = dataclasses.replace(CLUSTER, mtbf=mtbf)
            windows = 300 if mtbf > 60 or interval < 50 else 60
            loss = simulate(cluster, windows, interval, runs=1, seed=seed)
            assert windows / loss.goodput == pytest.approx(walk(cluster, windows, interval, seed))


def test_shares_of_time_add_up() -> None:
    loss = simulate(CLUSTER, 5000, 40, **SMALL)
    all_reduce = loss.goodput * CLUSTER.exposed / CLUSTER.compute
    assert loss.goodput + loss.stall + loss.lost + all_reduce == pytest.approx(1)
    assert min(loss.stall, loss.lost, loss.failures) > 0


def test_without_failures_goodput_is_the_share_of_computing() -> None:
    loss = simulate(RELIABLE, 1000, 100, **SMALL)
    assert loss.goodput == pytest.approx(1000 / (1000 * 1.1 + 9 * 0.5), rel=1e-12)
    assert loss.lost == pytest.approx(0, abs=1e-12)
    assert loss.failures == 0
    assert simulate(RELIABLE, 1000, 1000, **SMALL).goodput == pytest.approx(1 / 1.1, rel=1e-12)


def test_a_save_waits_for_an_unfinished_write() -> None:
    loss = simulate(RELIABLE, 10, 1, **SMALL)  # a window takes 1.1 s, a write 6 s
    assert 10 / loss.goodput == pytest.approx(10 * 1.1 + 9 * 0.5 + 8 * (6 - 1.1))


@pytest.mark.parametrize("mtbf", [200.0, 500.0, 2000.0])
def test_losses_agree_with_daly(mtbf: float) -> None:
    """If failures are rare, they also agree with the sum of losses that Young's interval minimises."""
    cluster = dataclasses.replace(CLUSTER, mtbf=mtbf)
    most = cluster.compute / cluster.window
    for factor in (0.5, 1, 2, 4):
        interval = round(factor * young(cluster) / cluster.window)
        loss = simulate(cluster, 100_000, interval, runs=50, seed=1)
        assert 1 - loss.goodput / most == pytest.approx(1 - daly(cluster, interval) / most, rel=0.02)
        if mtbf == 2000:
            seconds = interval * cluster.window
            first_order = cluster.copy / seconds + (seconds / 2 + cluster.write + cluster.mean_outage) / mtbf
            assert 1 - loss.goodput / most == pytest.approx(first_order, rel=0.05)


def test_the_best_interval_is_no_worse_than_half_of_it_and_twice_it() -> None:
    interval, loss = best_interval(CLUSTER, 20_000, **SMALL)
    assert loss == simulate(CLUSTER, 20_000, interval, **SMALL)
    for other in (interval // 2, interval * 2):
        assert loss.goodput >= simulate(CLUSTER, 20_000, other, **SMALL).goodput
    assert young(CLUSTER) / 2 < interval * CLUSTER.window < 2 * young(CLUSTER)


def test_a_run_too_short_for_any_checkpoint_takes_its_length_as_interval() -> None:
    interval, loss = best_interval(dataclasses.replace(CLUSTER, mtbf=1e9), 10, **SMALL)
    assert interval == 10
    assert loss.goodput == pytest.approx(1 / 1.1)
    assert best_interval(RELIABLE, 10, **SMALL)[0] == 10


def test_more_gpus_have_less_goodput() -> None:
    options = parse([])
    goodput = [
        best_interval(cluster_of(options, num_gpus, node_mtbf=24), 50_000, **SMALL)[1].goodput
        for num_gpus in (8, 64, 256, 1024)
    ]
    assert goodput == sorted(goodput, reverse=True)
    assert goodput[0] - goodput[-1] > 0.05


def test_failures_of_gpus_and_machines_add_up() -> None:
    cluster = cluster_of(parse(["--gpu-mtbf", "8000", "--silent-share", "0"]), 16, node_mtbf=500)
    assert cluster.mtbf / 3600 == pytest.approx(1 / (16 / 8000 + 2 / 500))
    assert cluster.silent_share == pytest.approx(2 / 3)  # that of machines taken away


def test_the_seed_decides_the_failures() -> None:
    first, again = (simulate(CLUSTER, 5000, 40, **SMALL) for _ in range(2))
    assert first == again
    assert simulate(CLUSTER, 5000, 40, runs=200, seed=4) != first


def test_all_reduce_is_hidden_except_for_the_last_bucket() -> None:
    exposed = functools.partial(
        all_reduce_exposed, num_bytes=400, bucket_bytes=100, gpus_per_node=8, bandwidth_inside=100,
        bandwidth_between=10, latency_inside=0, latency_between=0,
    )  # fmt: skip
    assert exposed(1, hideable=0) == 0
    assert exposed(8, hideable=0) == pytest.approx(2 * 7 / 8 * 4)
    assert exposed(8, hideable=5) == pytest.approx(2 * 7 / 8 * 4 - 5)
    assert exposed(8, hideable=99) == pytest.approx(2 * 7 / 8)
    assert exposed(16, hideable=0) == pytest.approx(2 * 15 / 16 * 40)


def test_latency_grows_with_the_number_of_machines() -> None:
    times = [
        all_reduce_exposed(
            num_gpus, 4e9, 0.1, gpus_per_node=8, bucket_bytes=25e6, bandwidth_inside=3e11, bandwidth_between=5e10,
            latency_inside=3e-6, latency_between=1e-5,
        )
        for num_gpus in (16, 64, 512, 4096)
    ]  # fmt: skip
    assert times == sorted(times)
    assert times[-1] < 2 * times[0]  # by a tree; a ring would take far longer


def test_the_tables_begin_with_their_assumptions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--preset", "large", "--gpus", "8", "16", "--failures", "50", "--windows", "10000"]
    monkeypatch.setattr(sys, "argv", ["cluster_simulation.py", *few])
    main()
    text = capsys.readouterr().out
    assert text.startswith("Assumed: 1100 M parameters, 4.40 GB of gradients, 17.60 GB of state")
    assert len([line for line in text.splitlines() if line.startswith(("| 8 |", "| 16 |"))]) == 4
