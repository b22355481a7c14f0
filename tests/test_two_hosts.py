"""Two hosts and the link between them: network namespaces, each with a launcher of its own, joined by a veth pair.

What comes of a link that is cut, by what ``--rank-timeout`` and PyTorch's launcher make of it:

- shorter than ``--rank-timeout``: nothing. TCP sends again what was lost, and the run goes on where it stood.
- longer than ``--rank-timeout``: the ranks of both hosts end and tell why. The launchers wait for each other and start
  the ranks again from the newest checkpoint.
- longer than what a launcher waits for the store of the first host's (60 s, ``--rdzv-conf read_timeout``): launchers
  may end, too, and have the run saved if they can. The command that it was started with goes on.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import differing_tensors
from launching import LAUNCHER, Launch, load, read_events

pytestmark = pytest.mark.slow

ADDRESSES = ("10.77.0.1", "10.77.0.2")  # these, and the names that follow, are the namespaces' own
DEVICE, PORT = "veth0", 29400
NOBODY = "02:00:00:00:00:01"
EPOCHS = 4  # of 8 windows: 15 samples, 2 at a time
FLAGS = ("--epochs", str(EPOCHS), "--accumulation-steps", "1", "--checkpoint-every", "1", "--resume", "auto")
CUT = 10.0  # seconds
SHORTER_THAN_CUT = ("--rank-timeout", "4")
LONGER_THAN_CUT = ("--rank-timeout", "60")


class Hosts:
    """Two network namespaces. Of what two machines have each of its own, they share the disk and the name."""

    def __init__(self) -> None:
        token = secrets.token_hex(4)
        self.names = (f"host-{token}-a", f"host-{token}-b")

    def set_up(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        one, other = self.names
        _ip("link", "add", "name", DEVICE, "netns", one, "type", "veth", "peer", "name", DEVICE, "netns", other)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", DEVICE, "addrgenmode", "none")  # no IPv6: it would get around the cut
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")

    def tear_down(self) -> None:
        for number, name in enumerate(self.names):
            self.kill(number)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def kill(self, number: int) -> None:
        """All processes of a host, at once."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, check=False)
        for process in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def cut(self) -> None:
        """From now on all that either sends is lost, and neither is told: as by a switch between them that has died."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neighbour", "replace", other, "lladdr", NOBODY, "nud", "permanent", "dev", DEVICE)

    def heal(self) -> None:
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neighbour", "delete", other, "dev", DEVICE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


class Run(Launch):
    """Of two ranks, one on each host, and a launcher on each. The launchers meet in a store of the first one's.

    Args:
        hosts: where.
        dataset: what it trains on.
        folder: for what comes of it.
        signal_at: see ``ranks.py``.
        environment: of the launchers, more than this process has.
        rendezvous: settings of the launchers.
    """

    def __init__(
        self, hosts: Hosts, dataset: Path, folder: Path, signal_at: str = "",
        environment: dict[str, str] | None = None, **rendezvous: int,
    ) -> None:  # fmt: skip
        super().__init__(dataset, folder)
        self.hosts = hosts
        self.variables = self.environment(signal_at) | {"GLOO_SOCKET_IFNAME": DEVICE} | (environment or {})
        self.rendezvous = rendezvous
        self.launchers: list[subprocess.Popen[bytes]] = []

    def begin(self, *flags: str) -> None:
        self.launchers = [self.launch(number, *flags) for number in range(2)]

    def launch(self, number: int, *flags: str) -> "subprocess.Popen[bytes]":
        settings = {"is_host": str(number == 0).lower()} | self.rendezvous
        command = [
            *("ip", "netns", "exec", self.hosts.names[number], *LAUNCHER[:-1]),  # without --standalone
            *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two-hosts", "--max-restarts=3"),
            *(f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--local-addr={ADDRESSES[number]}"),
            f"--rdzv-conf={','.join(f'{name}={value}' for name, value in settings.items())}",
            *self.command(1, *FLAGS, *flags)[1:],
        ]
        with open(self._terminal(number), "ab") as terminal:
            return subprocess.Popen(command, env=self.variables, stdout=terminal, stderr=terminal)

    def _terminal(self, number: int) -> Path:
        return self.samples.parent / f"host-{number}.txt"

    def told(self, number: int) -> str:
        return self._terminal(number).read_text(errors="replace")

    def num_windows(self) -> int:
        return len(self.events("window"))

    def events(self, event: str) -> list[dict[str, Any]]:
        return read_events(self.directory, event) if (self.directory / "metrics.jsonl").exists() else []

    def wait_for(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        """Generous: other tests may have the cores."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.told(number) for number in range(2))
            time.sleep(0.05)

    def train_into_midst(self, *flags: str) -> None:
        self.begin(*flags)
        self.wait_for(lambda: self.num_windows() >= 3)

    def exit_codes(self) -> list[int]:
        """Of the launchers, which end by themselves."""
        self.wait_for(lambda: all(launcher.poll() is not None for launcher in self.launchers))
        return [launcher.wait() for launcher in self.launchers]

    def cut_link(self) -> None:
        """For the time being, in which the run stands still."""
        self.hosts.cut()
        time.sleep(1)
        done = self.num_windows()
        assert done < EPOCHS * 8 - 1
        time.sleep(CUT - 1)
        assert self.num_windows() == done
        self.hosts.heal()

    def final(self) -> dict[str, Any]:
        return load(self.directory / f"epoch_{EPOCHS:04d}.pth")


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    """Skip what cannot be run here."""
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("needs `ip`, of iproute2, to make network namespaces")
    hosts = Hosts()
    try:
        hosts.set_up()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        hosts.tear_down()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    try:
        hosts.set_up()
        yield hosts
    finally:
        hosts.tear_down()


@pytest.fixture(scope="module")
def one_host(odd_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run of two ranks on one host ends with."""
    launch = Launch(odd_dataset, tmp_path_factory.mktemp("one-host"))
    code, _, err = launch.run(2, *FLAGS)
    assert code == 0, err
    return load(launch.directory / f"epoch_{EPOCHS:04d}.pth")


def test_two_hosts_compute_bitwise_what_one_does(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    run = Run(hosts, odd_dataset, tmp_path)
    run.begin()
    assert run.exit_codes() == [0, 0], run.told(0) + run.told(1)
    assert differing_tensors(run.final(), one_host) == []


def test_a_cut_shorter_than_the_rank_timeout_delays_the_run_and_nothing_else(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """TCP sends again, at the latest after as long as the cut has lasted; no rank ends, and no window comes twice."""
    run = Run(hosts, odd_dataset, tmp_path)
    run.train_into_midst(*LONGER_THAN_CUT)
    run.cut_link()
    assert run.exit_codes() == [0, 0], run.told(0) + run.told(1)
    assert run.events("resume") == []
    assert run.num_windows() == EPOCHS * 8
    assert "error:" not in run.told(0) + run.told(1)
    assert differing_tensors(run.final(), one_host) == []


def test_a_cut_longer_than_the_rank_timeout_ends_the_ranks_and_the_launchers_start_them_again(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """The host with the store misses the other's rank, the other host the store. Both have told before the link is
    back, which the launchers wait for.
    """
    run = Run(hosts, odd_dataset, tmp_path)
    run.train_into_midst(*SHORTER_THAN_CUT)
    run.cut_link()
    assert "error: rank 1 (process" in run.told(0)
    assert "has been silent for" in run.told(0)
    assert "error: the launcher's store has not answered for" in run.told(1)
    assert run.exit_codes() == [0, 0], run.told(0) + run.told(1)
    assert run.events("resume")
    assert differing_tensors(run.final(), one_host) == []


def test_after_a_cut_that_a_launcher_gives_up_in_the_same_command_goes_on(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """Which operation the cut strikes decides whether a launcher gives up; if so, both end once the link is back."""
    run = Run(hosts, odd_dataset, tmp_path, read_timeout=4, join_timeout=40)
    run.train_into_midst(*LONGER_THAN_CUT)
    run.cut_link()
    if run.exit_codes() != [0, 0]:
        run.rendezvous = {}
        run.begin(*LONGER_THAN_CUT)
        assert run.exit_codes() == [0, 0], run.told(0) + run.told(1)
    assert differing_tensors(run.final(), one_host) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_on_either_host_is_started_again_with_the_other(
    rank: int, hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """One launcher counts a restart then, and the other, which restarts because of the first, none."""
    run = Run(hosts, odd_dataset, tmp_path, signal_at=f"{rank}:6:SIGKILL")
    run.begin()
    assert run.exit_codes() == [0, 0], run.told(0) + run.told(1)
    assert f"error: rank {rank} (process" in run.told(1 - rank)
    assert run.events("resume")
    assert differing_tensors(run.final(), one_host) == []


def test_a_host_that_loses_power_is_named_and_takes_part_again_once_it_is_back(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """A new launcher is told where to find the ranks' store only if the others make a new one for it: torch's variable
    has them do so.
    """
    run = Run(hosts, odd_dataset, tmp_path, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    run.train_into_midst(*SHORTER_THAN_CUT)
    hosts.cut()  # else the kernel would tell the other side that the processes have gone
    hosts.kill(1)
    run.wait_for(lambda: "has been silent for" in run.told(0), seconds=30)
    assert "error: rank 1 (process" in run.told(0)
    hosts.heal()
    run.launchers[1].wait()
    run.launchers[1] = run.launch(1, *SHORTER_THAN_CUT)
    assert run.exit_codes() == [0, 0], run.told(0) + run.told(1)
    assert run.events("resume")
    assert differing_tensors(run.final(), one_host) == []
