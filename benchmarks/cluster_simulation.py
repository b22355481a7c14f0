"""What a run on many GPUs costs beyond its arithmetic, simulated: gradients on the wire, checkpoints, failures.

    python benchmarks/cluster_simulation.py [--preset default|large] [--gpus 8 64 512] [--rank-timeout 60] [see --help]

Each GPU has a fixed batch (weak scaling), so a window computes for the same time on any number of them. What comes on
top: the part of the gradients' all-reduce that the backward pass does not hide; the copy of the state to host memory at
each checkpoint, and the wait for a write that is still under way; failures, which come at random, are noticed, cost a
restart, and take back what came after the last checkpoint that is complete on the disk. For each number of GPUs the
interval between checkpoints (--checkpoint-every) that loses least is looked for, and compared with what theory gives:
Young's interval (1974), sqrt(2 x stall x mean time between failures), and Daly's expected run time (2006).

The simulation goes from failure to failure. Nothing is random in between, so windows, saves and writes of that stretch
follow by arithmetic; tests/test_cluster_simulation.py walks through them one by one and arrives at the same.
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
MOST_RUNS = 200_000  # where failures are so rare that even these do not bring as many as were asked for


@dataclass(frozen=True)
class Cluster:
    """A run on so many GPUs, in seconds.

    Attributes:
        compute: a window's forward and backward pass and step.
        exposed: what talking to the other GPUs adds to it.
        copy: of the state to host memory; training waits for it.
        write: of the copy to the disk, read back and verified; training goes on meanwhile.
        restart: from the launcher's decision to the first window, the state read from the disk.
        mtbf: mean time between failures of the whole; inf for none.
        prompt: until the others know that a process has died, or that its machine has said so.
        silent: until they know that one says nothing any more.
        silent_share: of the failures that are silent, 0 to 1.
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
    """Where the time of runs went, as shares of it: means over all of them.

    ``goodput`` is computing that counts, ``stall`` waiting for copies and writes of checkpoints, ``lost`` work done
    twice, detection and restarts. What is missing from 1 is the all-reduce.
    """

    goodput: float
    stall: float
    lost: float
    failures: float  # of a run


def all_reduce_exposed(
    num_gpus: int, num_bytes: float, hideable: float, *, gpus_per_node: int, bucket_bytes: float,
    bandwidth_inside: float, bandwidth_between: float, latency_inside: float, latency_between: float,
) -> float:  # fmt: skip
    """Seconds that averaging the gradients adds to a window.

    A ring sends 2 (n - 1) / n times a bucket's bytes through its slowest link, in 2 (n - 1) hops; a tree twice its
    bytes, in hops that grow with the logarithm of the nodes. The faster one counts. The last bucket is complete when
    the backward pass is, so nothing hides it; nor the few numbers that make one verdict of all ranks', which are all
    latency.

    Args:
        num_gpus: at least 1.
        num_bytes: of all gradients.
        hideable: seconds of the backward pass during which links and GPU work side by side.
        gpus_per_node: GPUs that share a machine.
        bucket_bytes: gradients are sent as soon as so many are there; DistributedDataParallel's 25 MiB.
        bandwidth_inside: bytes per second between two GPUs of a machine.
        bandwidth_between: bytes per second out of a machine, all its network cards together.
        latency_inside: seconds a hop.
        latency_between: seconds a hop from machine to machine.
    """
    if num_gpus == 1:
        return 0.0
    nodes = -(-num_gpus // gpus_per_node)
    bandwidth = bandwidth_inside if nodes == 1 else min(bandwidth_inside, bandwidth_between)
    between = nodes if nodes > 1 else 0  # hops of the ring that leave a machine
    around = 2 * (num_gpus - 1) / num_gpus
    ring = around * (between * latency_between + (num_gpus - between) * latency_inside)
    tree = 2 * (math.ceil(math.log2(nodes)) * latency_between + (min(num_gpus, gpus_per_node) - 1) * latency_inside)

    def seconds(size: float) -> float:
        return min(around * size / bandwidth + ring, 2 * size / bandwidth + tree)

    buckets = max(1, math.ceil(num_bytes / bucket_bytes))
    exposed = max(seconds(min(num_bytes, bucket_bytes)), buckets * seconds(num_bytes / buckets) - hideable)
    return exposed + min(ring, tree)


def simulate(cluster: Cluster, windows: int, interval: int, runs: int, seed: int) -> Loss:
    """Runs of so many windows that save every ``interval`` windows, from failure to failure.

    Args:
        cluster: what everything costs.
        windows: of a run, at least 1.
        interval: windows, at least 1.
        runs: how many, each with failures of its own.
        seed: of the failures; they come at the same times whatever the interval, so that intervals can be compared.
    """
    random = np.random.default_rng(seed)
    left = np.full(runs, windows)
    total, stall, lost, failures = np.zeros((4, runs))
    outage = np.zeros(runs)  # restart before the first window
    while (left > 0).any():
        gap = random.exponential(1.0, runs) * cluster.mtbf
        silent = random.random(runs) < cluster.silent_share
        running = left > 0
        kept, waited, spent, done = _until_failure(cluster, interval, left, gap - outage)
        time = np.where(done, outage + spent, gap)  # of this stretch
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
    """What becomes of runs that train from a checkpoint on, with the clock at 0, until a failure or their end.

    Args:
        cluster: what everything costs.
        interval: windows between checkpoints.
        left: (R,) windows to the end.
        available: (R,) seconds until the failure; negative where the restart has failed.

    Returns:
        checkpoints that were complete on the disk by then; seconds waited for checkpoints, those that are lost left
        out; seconds to the end; whether the end came first. All (R,).
    """
    first = interval * cluster.window + cluster.copy  # end of the first copy; nothing is being written yet
    cycle = max(interval * cluster.window, cluster.write) + cluster.copy
    saves = np.maximum(left - 1, 0) // interval  # the last window ends the run, it needs no save
    end_of_copies = np.where(saves > 0, first + (saves - 1) * cycle, 0.0)
    spent = end_of_copies + (left - saves * interval) * cluster.window
    done = available >= spent
    until = np.minimum(available, spent)  # inf where there are no failures
    complete = np.floor((until - cluster.write - first) / cycle).astype(np.int64) + 1
    kept = np.where(done, saves, np.clip(complete, 0, saves))
    waited = np.where(kept > 0, cluster.copy + (kept - 1) * (cycle - interval * cluster.window), 0.0)
    return kept, waited, spent, done


def young(cluster: Cluster) -> float:
    """The interval of Young (1974), in seconds of training; inf without failures."""
    return math.sqrt(2 * cluster.copy * cluster.mtbf)


def daly(cluster: Cluster, interval: int) -> float:
    """Goodput after the expected run time of Daly (2006) for failures that may strike at any time, restarts included.

    His restart takes in detection here, and the write: until that is over, a failure takes back one interval more.
    """
    seconds = interval * cluster.window
    if math.isinf(cluster.mtbf):
        return interval * cluster.compute / (seconds + cluster.copy)
    outage = math.exp((cluster.mean_outage + cluster.write) / cluster.mtbf)
    stretch = cluster.mtbf * outage * math.expm1((seconds + cluster.copy) / cluster.mtbf)
    return interval * cluster.compute / stretch


def candidates(cluster: Cluster, windows: int) -> list[int]:
    """Intervals in windows from a quarter to four times Young's, each 1.19 times the one before."""
    around = min(young(cluster) / cluster.window, windows)
    return sorted({min(max(round(around * 2 ** (step / 4)), 1), windows) for step in range(-8, 9)})


def best_interval(cluster: Cluster, windows: int, runs: int, seed: int) -> tuple[int, Loss]:
    """The interval in windows with the most goodput, simulated; and where the time goes then."""
    losses = {interval: simulate(cluster, windows, interval, runs, seed) for interval in candidates(cluster, windows)}
    best = max(losses, key=lambda interval: losses[interval].goodput)
    return best, losses[best]


def cluster_of(options: argparse.Namespace, num_gpus: int, node_mtbf: float) -> Cluster:
    """What everything costs on so many GPUs.

    Args:
        options: the flags.
        num_gpus: at least 1.
        node_mtbf: mean hours until a machine is taken away, of which only its silence tells; inf for never.
    """
    nodes = -(-num_gpus // options.gpus_per_node)
    failures, losses = num_gpus / options.gpu_mtbf, nodes / node_mtbf  # an hour
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
    """All that the tables rest on, in one paragraph."""
    gradients, state = (options.parameters * size / 1e3 for size in (options.gradient_bytes, options.state_bytes))
    return (
        f"Assumed: {options.parameters:g} M parameters, {gradients:.2f} GB of gradients, {state:.2f} GB of state; "
        f"a window of {options.step * 1000:g} ms on each GPU with {options.images_per_gpu} images, "
        f"{options.backward_share:.0%} of it backward pass, batches in it: {options.accumulation_steps}, the last "
        f"one's backward pass hides communication for {options.overlap:.0%} of its length; {options.gpus_per_node} "
        f"GPUs a node, {options.bandwidth_inside:g} GB/s and {options.latency_inside:g} us a hop between them, "
        f"{options.bandwidth_between:g} GB/s and {options.latency_between:g} us between nodes, buckets of "
        f"{options.bucket:g} MiB; a checkpoint copied at {options.copy_rate:g} GB/s while training waits, then written "
        f"and verified at {options.disk_rate:g} GB/s while it goes on; {options.gpu_mtbf:,g} h between failures of a "
        f"GPU, {options.silent_share:.0%} of them noticed by a silence of {options.rank_timeout:g} s, the others "
        f"within {options.detection:g} s; pre-emptible nodes taken away after {options.preemption:g} h on average, "
        f"noticed by their silence; {options.restart:g} s and reading the state to start again, with another machine "
        f"or without the lost one at no loss of speed; epochs of {options.epoch_images:,.0f} images; runs of "
        f"{options.windows:,} windows, as many as bring {options.failures:,g} failures, but no more than "
        f"{MOST_RUNS:,}; seed {options.seed}."
    )


HEADER = (
    "GPUs", "window, ms", "all-reduce not hidden, ms", "time between failures", "best interval, s", "in windows",
    "stall", "lost work, detection, restart", "goodput", "by Daly", "goodput, epochs' checkpoints only",
)  # fmt: skip


def rows(options: argparse.Namespace, node_mtbf: float) -> Iterator[tuple[str, ...]]:
    """A row of the table for each number of GPUs."""
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
    flag("--step", type=float, help="seconds that a window takes on one GPU alone")
    flag("--accumulation-steps", type=int, help="batches of a window; gradients are sent with the last one")
    flag("--images-per-gpu", type=int, default=8, help="of a window")
    flag("--gradient-bytes", type=float, default=4, help="a parameter: fp32")
    flag("--state-bytes", type=float, default=16, help="a parameter: weights, average, two moments")
    flag("--backward-share", type=float, default=0.67, help="of a window's time")
    flag("--epoch-images", type=float, default=1e7, help="images of an epoch, for the last column")
    flag = parser.add_argument_group("the machines").add_argument
    flag("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    flag("--gpus-per-node", type=int, default=8)
    flag("--bandwidth-inside", type=float, default=300, help="GB/s between the GPUs of a node")
    flag("--bandwidth-between", type=float, default=50, help="GB/s between nodes: a card of 400 Gbit/s in each")
    flag("--latency-inside", type=float, default=3, help="microseconds a hop")
    flag("--latency-between", type=float, default=10, help="microseconds a hop")
    flag("--bucket", type=float, default=25, help="MiB of gradients that are sent at once")
    flag("--overlap", type=float, default=0.8, help="share of the last backward pass that hides communication")
    flag("--copy-rate", type=float, default=20, help="GB/s from the GPU to host memory")
    flag("--disk-rate", type=float, default=1, help="GB/s of writing, flushing and reading back a checkpoint")
    flag = parser.add_argument_group("failures").add_argument
    flag("--gpu-mtbf", type=float, default=50_000, help="mean hours between failures, a GPU")
    flag("--preemption", type=float, default=24, help="mean hours until a node is taken away: second table")
    flag("--silent-share", type=float, default=0.3, help="of GPU failures after which nothing but silence tells")
    flag("--rank-timeout", type=float, default=60, help="seconds of silence, the program's flag")
    flag("--detection", type=float, default=5, help="seconds until the others know of a process that has died")
    flag("--restart", type=float, default=60, help="seconds from there to the first window, without reading the state")
    flag = parser.add_argument_group("the simulation").add_argument
    flag("--windows", type=int, default=1_000_000, help="of a run")
    flag("--failures", type=float, default=20_000, help="to be simulated for each number of GPUs")
    flag("--seed", type=int, default=0)
    # fmt: on
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    print(textwrap.fill(assumptions(options), 120))
    tables = {
        "Machines that stay": math.inf,
        f"Pre-emptible machines, each taken away after {options.preemption:g} h, without notice": options.preemption,
    }
    for title, node_mtbf in tables.items():
        print(f"\n{title}:\n\n| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
        for row in rows(options, node_mtbf):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
