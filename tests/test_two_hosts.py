"""Two hosts and the link between them: network namespaces, each with its own launcher, joined by a veth pair.

What a cut link does depends on how long it lasts:

- shorter than ``--rank-timeout``: nothing. TCP sends again what was lost, and the run continues.
- longer than ``--rank-timeout``: the ranks of both hosts end and print why. The launchers wait for each other and
  restart the ranks from the newest checkpoint.
- longer than a launcher waits for the store on the first host (60 s, ``--rdzv-conf read_timeout``): launchers may end
  too, after saving the run if they can. The same command resumes it.
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
from launching import LAUNCHER, Launch, read_events

pytestmark = pytest.mark.slow

ADDRESSES = ("10.77.0.1", "10.77.0.2")  # inside the namespaces, as are the names below
DEVICE, PORT = "veth0", 29400
NOBODY = "02:00:00:00:00:01"
EPOCHS = 4  # 8 windows each: 15 samples, 2 per window
FLAGS = ("--epochs", str(EPOCHS), "--accumulation-steps", "1", "--checkpoint-every", "1", "--resume", "auto")
CUT = 10.0  # seconds
SHORTER_THAN_CUT = ("--rank-timeout", "4")
LONGER_THAN_CUT = ("--rank-timeout", "60")


class Hosts:
    """Two network namespaces; unlike two machines, they share the disk and the host name."""

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
        """Kill all processes of a host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, check=False)
        for process in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def cut(self) -> None:
        """Lose all that either host sends, without an error on either side, like a dead switch between them."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neighbour", "replace", other, "lladdr", NOBODY, "nud", "permanent", "dev", DEVICE)

    def heal(self) -> None:
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neighbour", "delete", other, "dev", DEVICE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


class Run(Launch):
    """A run of two ranks, one on each host, with a launcher on each. The first host has the launchers' store.

    Args:
        hosts: the two hosts.
        dataset: the dataset's folder.
        folder: parent of the run's folder.
        signal_at: see ``ranks.py``.
        environment: additional variables for the launchers.
        rendezvous: settings for ``--rdzv-conf``.
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

    def printed(self, number: int) -> str:
        return self._terminal(number).read_text(errors="replace")

    def num_windows(self) -> int:
        return len(self.events("window"))

    def events(self, event: str) -> list[dict[str, Any]]:
        return read_events(self.directory, event) if (self.directory / "metrics.jsonl").exists() else []

    def wait_for(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        """Wait, generously: other tests may be using the cores."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.printed(number) for number in range(2))
            time.sleep(0.05)

    def train_a_few_windows(self, *flags: str) -> None:
        self.begin(*flags)
        self.wait_for(lambda: self.num_windows() >= 3)

    def exit_codes(self) -> list[int]:
        """Wait for the launchers, which end by themselves, and return their exit codes."""
        self.wait_for(lambda: all(launcher.poll() is not None for launcher in self.launchers))
        return [launcher.wait() for launcher in self.launchers]

    def cut_link(self) -> None:
        """Cut the link for ``CUT`` seconds, during which the run stands still."""
        self.hosts.cut()
        time.sleep(1)
        done = self.num_windows()
        assert done < EPOCHS * 8 - 1
        time.sleep(CUT - 1)
        assert self.num_windows() == done
        self.hosts.heal()


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    """Skip these tests on machines that cannot make network namespaces."""
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
    """The final checkpoint of an undisturbed run of two ranks on one host."""
    launch = Launch(odd_dataset, tmp_path_factory.mktemp("one-host"))
    code, _, err = launch.run(2, *FLAGS)
    assert code == 0, err
    return launch.final(EPOCHS)


def test_two_hosts_compute_bitwise_what_one_does(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    run = Run(hosts, odd_dataset, tmp_path)
    run.begin()
    assert run.exit_codes() == [0, 0], run.printed(0) + run.printed(1)
    assert differing_tensors(run.final(EPOCHS), one_host) == []


def test_cut_shorter_than_the_rank_timeout_only_delays_the_run(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """TCP sends again, after at most as long as the cut has lasted. No rank ends, and no window is run twice."""
    run = Run(hosts, odd_dataset, tmp_path)
    run.train_a_few_windows(*LONGER_THAN_CUT)
    run.cut_link()
    assert run.exit_codes() == [0, 0], run.printed(0) + run.printed(1)
    assert run.events("resume") == []
    assert run.num_windows() == EPOCHS * 8
    assert "error:" not in run.printed(0) + run.printed(1)
    assert differing_tensors(run.final(EPOCHS), one_host) == []


def test_cut_longer_than_the_rank_timeout_ends_the_ranks_and_the_launchers_restart_them(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """The host with the store misses the other rank, the other host misses the store. Both print it before the link is
    back; the launchers wait for the link.
    """
    run = Run(hosts, odd_dataset, tmp_path)
    run.train_a_few_windows(*SHORTER_THAN_CUT)
    run.cut_link()
    assert "error: rank 1 (process" in run.printed(0)
    assert "has been silent for" in run.printed(0)
    assert "error: the launcher's store has not answered for" in run.printed(1)
    assert run.exit_codes() == [0, 0], run.printed(0) + run.printed(1)
    assert run.events("resume")
    assert differing_tensors(run.final(EPOCHS), one_host) == []


def test_after_a_cut_that_ended_a_launcher_the_same_command_resumes_the_run(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """Whether a launcher ends depends on the operation that the cut hits; if so, both end once the link is back."""
    run = Run(hosts, odd_dataset, tmp_path, read_timeout=4, join_timeout=40)
    run.train_a_few_windows(*LONGER_THAN_CUT)
    run.cut_link()
    if run.exit_codes() != [0, 0]:
        run.rendezvous = {}
        run.begin(*LONGER_THAN_CUT)
        assert run.exit_codes() == [0, 0], run.printed(0) + run.printed(1)
    assert differing_tensors(run.final(EPOCHS), one_host) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_on_either_host_is_restarted_with_the_other(
    rank: int, hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """Then one launcher counts a restart, and the other, which restarts because of the first, does not."""
    run = Run(hosts, odd_dataset, tmp_path, signal_at=f"{rank}:6:SIGKILL")
    run.begin()
    assert run.exit_codes() == [0, 0], run.printed(0) + run.printed(1)
    assert f"error: rank {rank} (process" in run.printed(1 - rank)
    assert run.events("resume")
    assert differing_tensors(run.final(EPOCHS), one_host) == []


def test_host_that_loses_power_is_named_and_takes_part_again_once_it_is_back(
    hosts: Hosts, one_host: dict[str, Any], odd_dataset: Path, tmp_path: Path
) -> None:
    """A new launcher learns the address of the ranks' store only if the others make a new store for it, which torch's
    variable makes them do.
    """
    run = Run(hosts, odd_dataset, tmp_path, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    run.train_a_few_windows(*SHORTER_THAN_CUT)
    hosts.cut()  # else the kernel would close the connections of the killed processes
    hosts.kill(1)
    run.wait_for(lambda: "has been silent for" in run.printed(0), seconds=30)
    assert "error: rank 1 (process" in run.printed(0)
    hosts.heal()
    run.launchers[1].wait()
    run.launchers[1] = run.launch(1, *SHORTER_THAN_CUT)
    assert run.exit_codes() == [0, 0], run.printed(0) + run.printed(1)
    assert run.events("resume")
    assert differing_tensors(run.final(EPOCHS), one_host) == []
