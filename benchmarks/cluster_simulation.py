"""Simulation of a run's costs on many GPUs beyond its arithmetic: gradients on the wire, checkpoints, failures.

    python benchmarks/cluster_simulation.py [--preset default|large] [--gpus 8 64 512] [--rank-timeout 60] [see --help]

Each GPU has a fixed batch (weak scaling), so a window computes for the same time on any number of them. Costs beyond
that: the part of the gradients' all-reduce that the backward pass does not hide; the copy of the state to host memory
at each checkpoint, and the wait for an unfinished write; random failures, which must be detected, cost a restart, and
take back all work since the last checkpoint that is complete on the disk. For each number of GPUs, the simulation finds
the interval between checkpoints (--checkpoint-every) that loses least, and compares it with theory: Young's interval
(1974), sqrt(2 x stall x mean time between failures), and Daly's expected run time (2006).

The simulation goes from failure to failure. Nothing is random in between, so windows, saves and writes of that stretch
follow by arithmetic; tests/test_cluster_simulation.py walks through them one by one and gets the same.
"""

import argparse
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HOUR = 3600.0
PRESETS = {
    "default": {"parameters": 27.5, "step": 0.25, "accumulation_steps": 4},
    "large": {"parameters": 1100.0, "step": 1.2, "accumulation_steps": 1},
}
MOST_RUNS = 200_000  # to simulate, even if rare failures leave fewer of them than --failures asks for


@dataclass(frozen=True)
class Cluster:
    """Costs of a run on a given number of GPUs. Times are in seconds.

    Attributes:
        compute: a window's forward and backward pass and step.
        exposed: communication in a window that the backward pass does not hide.
        copy: copy of the state to host memory; training waits for it.
        write: write of the copy to the disk, with its verification; training goes on meanwhile.
        restart: time from the launcher's decision to the first window, with the state read from the disk.
        mtbf: mean time between failures of the whole cluster; inf for none.
        prompt: detection of a process that has died, or whose machine announces it.
        silent: detection of a process that has only become silent.
        silent_share: share of failures that are silent, 0 to 1.
    """

    compute: float
    exposed: float
    copy: float
    write: float
    restart: float
    mtbf: float
    prompt: float
    silent: float
    silent_share: float

    @property
    def window(self) -> float:
        return self.compute + self.exposed

    @property
    def mean_outage(self) -> float:
        return self.restart + self.prompt + self.silent_share * (self.silent - self.prompt)


@dataclass(frozen=True)
class Loss:
    """Shares of the time of all runs; the rest is all-reduce."""

    goodput: float  # computing that counts
    stall: float  # waiting for copies and writes of checkpoints
    lost: float  # work done twice, detection, restarts
    failures: float  # mean number per run


def all_reduce_exposed(
    num_gpus: int, num_bytes: float, hideable: float, *, gpus_per_node: int, bucket_bytes: float,
    bandwidth_inside: float, bandwidth_between: float, latency_inside: float, latency_between: float,
) -> float:  # fmt: skip
    """Return the seconds that averaging the gradients adds to a window.

    A ring sends 2 (n - 1) / n times a bucket's bytes through its slowest link, in 2 (n - 1) hops; a tree twice its
    bytes, in hops that grow with the logarithm of the nodes. The faster one counts. The last bucket is complete when
    the backward pass is, so nothing hides it. Nor does anything hide the all-reduce of the verdict, a few numbers whose
    cost is latency.

    Args:
        num_gpus: number of GPUs, at least 1.
        num_bytes: size of all gradients.
        hideable: seconds of the backward pass during which links and GPU work side by side.
        gpus_per_node: GPUs that share a machine.
        bucket_bytes: bytes of gradients that are sent at once; 25 MiB in DistributedDataParallel.
        bandwidth_inside: bytes per second between two GPUs of a machine.
        bandwidth_between: bytes per second out of a machine, over all its network cards.
        latency_inside: seconds per hop inside a machine.
        latency_between: seconds per hop between machines.
    """
    if num_gpus == 1:
        return 0.0
    nodes = -(-num_gpus // gpus_per_node)
    bandwidth = bandwidth_inside if nodes == 1 else min(bandwidth_inside, bandwidth_between)
    between = nodes if nodes > 1 else 0  # number of the ring's hops that leave a machine
    around = 2 * (num_gpus - 1) / num_gpus
    ring = around * (between * latency_between + (num_gpus - between) * latency_inside)
    tree = 2 * (math.ceil(math.log2(nodes)) * latency_between + (min(num_gpus, gpus_per_node) - 1) * latency_inside)

    def seconds(size: float) -> float:
        return min(around * size / bandwidth + ring, 2 * size / bandwidth + tree)

    buckets = max(1, math.ceil(num_bytes / bucket_bytes))
    exposed = max(seconds(min(num_bytes, bucket_bytes)), buckets * seconds(num_bytes / buckets) - hideable)
    return exposed + min(ring, tree)


def simulate(cluster: Cluster, windows: int, interval: int, runs: int, seed: int) -> Loss:
    """Simulate runs that save every ``interval`` windows, from failure to failure.

    Args:
        cluster: the costs.
        windows: length of a run, at least 1.
        interval: windows between checkpoints, at least 1.
        runs: number of runs, each with other failures.
        seed: seed of the failures; their times do not depend on the interval, so that intervals can be compared.
    """
    random = np.random.default_rng(seed)
    left = np.full(runs, windows)
    total, stall, lost, failures = np.zeros((4, runs))
    outage = np.zeros(runs)  # seconds of the restart before the first window
    while (left > 0).any():
        gap = random.exponential(1.0, runs) * cluster.mtbf
        silent = random.random(runs) < cluster.silent_share
        running = left > 0
        kept, waited, spent, done = _until_failure(cluster, interval, left, gap - outage)
        time = np.where(done, outage + spent, gap)  # length of this stretch
        useful = np.where(done, left, kept * interval)
        detection = np.where(done, 0.0, np.where(silent, cluster.silent, cluster.prompt))
        total += running * (time + detection)
        stall += running * waited
        lost += running * (time + detection - waited - useful * cluster.window)
        failures += running & ~done
        left = np.where(running, left - useful, 0)
        outage = np.full(runs, cluster.restart)
    everything = total.sum()
    return Loss(
        goodput=runs * windows * cluster.compute / everything,
        stall=stall.sum() / everything,
        lost=lost.sum() / everything,
        failures=failures.mean(),
    )


def _until_failure(
    cluster: Cluster, interval: int, left: NDArray[np.integer], available: NDArray[np.floating]
) -> tuple[NDArray[np.integer], NDArray[np.floating], NDArray[np.floating], NDArray[np.bool_]]:
    """Train from a checkpoint, with the clock at 0, until a failure or the end of the run.

    Args:
        cluster: the costs.
        interval: windows between checkpoints.
        left: (R,) windows to the end.
        available: (R,) seconds until the failure; negative if the restart failed.

    Returns:
        number of checkpoints complete on the disk by then; seconds waited for them; seconds to the end; whether the end
        came first. All (R,).
    """
    first = interval * cluster.window + cluster.copy  # end of the first copy, which waits for no write
    cycle = max(interval * cluster.window, cluster.write) + cluster.copy
    saves = np.maximum(left - 1, 0) // interval  # none after the last window
    end_of_copies = np.where(saves > 0, first + (saves - 1) * cycle, 0.0)
    spent = end_of_copies + (left - saves * interval) * cluster.window
    done = available >= spent
    until = np.minimum(available, spent)  # available is inf without failures
    complete = np.floor((until - cluster.write - first) / cycle).astype(np.int64) + 1
    kept = np.where(done, saves, np.clip(complete, 0, saves))
    waited = np.where(kept > 0, cluster.copy + (kept - 1) * (cycle - interval * cluster.window), 0.0)
    return kept, waited, spent, done


def young(cluster: Cluster) -> float:
    """Return Young's interval (1974) in seconds of training; inf without failures."""
    return math.sqrt(2 * cluster.copy * cluster.mtbf)


def daly(cluster: Cluster, interval: int) -> float:
    """Return the goodput by Daly's expected run time (2006), for failures at any time, also during restarts.

    Daly's restart here includes detection and the write: a failure before its end takes back one interval more.
    """
    seconds = interval * cluster.window
    if math.isinf(cluster.mtbf):
        return interval * cluster.compute / (seconds + cluster.copy)
    outage = math.exp((cluster.mean_outage + cluster.write) / cluster.mtbf)
    stretch = cluster.mtbf * outage * math.expm1((seconds + cluster.copy) / cluster.mtbf)
    return interval * cluster.compute / stretch


def candidates(cluster: Cluster, windows: int) -> list[int]:
    """Return intervals in windows from a quarter to four times Young's, each 1.19 times the one before."""
    around = min(young(cluster) / cluster.window, windows)
    return sorted({min(max(round(around * 2 ** (step / 4)), 1), windows) for step in range(-8, 9)})


def best_interval(cluster: Cluster, windows: int, runs: int, seed: int) -> tuple[int, Loss]:
    """Return the interval in windows with the highest simulated goodput, and its shares of time."""
    losses = {interval: simulate(cluster, windows, interval, runs, seed) for interval in candidates(cluster, windows)}
    best = max(losses, key=lambda interval: losses[interval].goodput)
    return best, losses[best]


def cluster_of(options: argparse.Namespace, num_gpus: int, node_mtbf: float) -> Cluster:
    """Return the costs on a number of GPUs.

    Args:
        options: the flags.
        num_gpus: number of GPUs, at least 1.
        node_mtbf: mean hours until a machine is taken away without notice; inf for never.
    """
    nodes = -(-num_gpus // options.gpus_per_node)
    failures, losses = num_gpus / options.gpu_mtbf, nodes / node_mtbf  # per hour
    state = options.parameters * 1e6 * options.state_bytes
    return Cluster(
        compute=options.step,
        exposed=all_reduce_exposed(
            num_gpus,
            options.parameters * 1e6 * options.gradient_bytes,
            options.step * options.backward_share / options.accumulation_steps * options.overlap,
            gpus_per_node=options.gpus_per_node,
            bucket_bytes=options.bucket * 2**20,
            bandwidth_inside=options.bandwidth_inside * 1e9,
            bandwidth_between=options.bandwidth_between * 1e9,
            latency_inside=options.latency_inside * 1e-6,
            latency_between=options.latency_between * 1e-6,
        ),
        copy=state / (options.copy_rate * 1e9),
        write=state / (options.disk_rate * 1e9),
        restart=options.restart + state / (options.disk_rate * 1e9),
        mtbf=HOUR / (failures + losses),
        prompt=options.detection,
        silent=options.rank_timeout,
        silent_share=(failures * options.silent_share + losses) / (failures + losses),
    )


def assumptions(options: argparse.Namespace) -> str:
    """Return all assumptions of the tables in one paragraph."""
    gradients, state = (options.parameters * size / 1e3 for size in (options.gradient_bytes, options.state_bytes))
    return (
        f"Assumed: {options.parameters:g} M parameters, {gradients:.2f} GB of gradients, {state:.2f} GB of state; "
        f"a window of {options.step * 1000:g} ms on each GPU with {options.images_per_gpu} images, "
        f"{options.backward_share:.0%} of it backward pass, in {options.accumulation_steps} batches, of which the last "
        f"one's backward pass hides communication for {options.overlap:.0%} of its length; {options.gpus_per_node} "
        f"GPUs per node, {options.bandwidth_inside:g} GB/s and {options.latency_inside:g} us per hop between them, "
        f"{options.bandwidth_between:g} GB/s and {options.latency_between:g} us between nodes, buckets of "
        f"{options.bucket:g} MiB; a checkpoint copied at {options.copy_rate:g} GB/s while training waits, then written "
        f"and verified at {options.disk_rate:g} GB/s while it goes on; {options.gpu_mtbf:,g} h between failures of a "
        f"GPU, {options.silent_share:.0%} of them noticed by a silence of {options.rank_timeout:g} s, the others "
        f"within {options.detection:g} s; pre-emptible nodes taken away after {options.preemption:g} h on average, "
        f"noticed by their silence; {options.restart:g} s plus reading the state for a restart, with another machine "
        f"or without the lost one at no loss of speed; epochs of {options.epoch_images:,.0f} images; runs of "
        f"{options.windows:,} windows, as many as cause {options.failures:,g} failures, but no more than "
        f"{MOST_RUNS:,}; seed {options.seed}."
    )


HEADER = (
    "GPUs", "window, ms", "all-reduce not hidden, ms", "time between failures", "best interval, s", "in windows",
    "stall", "lost work, detection, restart", "goodput", "by Daly", "goodput, epochs' checkpoints only",
)  # fmt: skip


def rows(options: argparse.Namespace, node_mtbf: float) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each number of GPUs."""
    for num_gpus in options.gpus:
        cluster = cluster_of(options, num_gpus, node_mtbf)
        runs = math.ceil(options.failures * cluster.mtbf / (options.windows * cluster.window))
        runs = min(max(runs, 1), MOST_RUNS)
        interval, loss = best_interval(cluster, options.windows, runs, options.seed)
        epoch = max(1, math.ceil(options.epoch_images / (options.images_per_gpu * num_gpus)))
        with_epochs = simulate(cluster, options.windows, epoch, runs, options.seed)
        yield (
            f"{num_gpus:,}",
            f"{cluster.window * 1000:.1f}",
            f"{cluster.exposed * 1000:.2f}",
            f"{cluster.mtbf / HOUR:,.1f} h" if cluster.mtbf >= HOUR else f"{cluster.mtbf / 60:.1f} min",
            f"{interval * cluster.window:,.0f}",
            f"{interval:,}",
            f"{loss.stall:.2%}",
            f"{loss.lost:.2%}",
            f"{loss.goodput:.2%}",
            f"{daly(cluster, interval):.2%}",
            f"{with_epochs.goodput:.2%}",
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    flag = parser.add_argument_group("the model").add_argument
    flag("--preset", choices=PRESETS, default="default", help="default: pvt_v2_b2 at 384 px; large: 1.1 B parameters")
    flag("--parameters", type=float, help="millions")
    flag("--step", type=float, help="seconds that a window takes on a single GPU")
    flag("--accumulation-steps", type=int, help="batches per window; gradients are sent with the last one")
    flag("--images-per-gpu", type=int, default=8, help="images per window on each GPU")
    flag("--gradient-bytes", type=float, default=4, help="bytes per parameter: fp32")
    flag("--state-bytes", type=float, default=16, help="bytes per parameter: weights, average, two moments")
    flag("--backward-share", type=float, default=0.67, help="share of a window's time")
    flag("--epoch-images", type=float, default=1e7, help="images per epoch, for the last column")
    flag = parser.add_argument_group("the machines").add_argument
    flag("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    flag("--gpus-per-node", type=int, default=8)
    flag("--bandwidth-inside", type=float, default=300, help="GB/s between the GPUs of a node")
    flag("--bandwidth-between", type=float, default=50, help="GB/s between nodes: one 400 Gbit/s card each")
    flag("--latency-inside", type=float, default=3, help="microseconds per hop")
    flag("--latency-between", type=float, default=10, help="microseconds per hop")
    flag("--bucket", type=float, default=25, help="MiB of gradients that are sent at once")
    flag("--overlap", type=float, default=0.8, help="share of the last backward pass that hides communication")
    flag("--copy-rate", type=float, default=20, help="GB/s from the GPU to host memory")
    flag("--disk-rate", type=float, default=1, help="GB/s of writing, flushing and reading back a checkpoint")
    flag = parser.add_argument_group("failures").add_argument
    flag("--gpu-mtbf", type=float, default=50_000, help="mean hours between failures of one GPU")
    flag("--preemption", type=float, default=24, help="mean hours until a node is taken away: second table")
    flag("--silent-share", type=float, default=0.3, help="share of GPU failures that only silence reveals")
    flag("--rank-timeout", type=float, default=60, help="seconds of silence: the flag of train")
    flag("--detection", type=float, default=5, help="seconds until a process's death is detected")
    flag("--restart", type=float, default=60, help="seconds to the first window, without reading the state")
    flag = parser.add_argument_group("the simulation").add_argument
    flag("--windows", type=int, default=1_000_000, help="windows per run")
    flag("--failures", type=float, default=20_000, help="failures to simulate for each number of GPUs")
    flag("--seed", type=int, default=0)
    # fmt: on
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    print(textwrap.fill(assumptions(options), 120))
    tables = {
        "Machines that stay": math.inf,
        f"Pre-emptible machines, each taken away after {options.preemption:g} h without notice": options.preemption,
    }
    for title, node_mtbf in tables.items():
        print(f"\n{title}:\n\n| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
        for row in rows(options, node_mtbf):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
