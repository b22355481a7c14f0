"""Signals of one process, and of several that must act on them at the same window."""

import os
import signal
from collections.abc import Iterator

import pytest

from runtime.signals import Signals

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered_and_a_second_one_acts_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.signal_number is None
        send(number)
        assert signals.signal_number == number
        assert signal.getsignal(number) == before


def test_first_ctrl_c_says_what_a_second_one_does(capfd: pytest.CaptureFixture[str]) -> None:
    with Signals():
        send(signal.SIGTERM)
        assert capfd.readouterr().err == ""
    with Signals():
        send(signal.SIGINT)
        assert "press Ctrl-C again to end the run at once" in capfd.readouterr().err


def test_under_a_launcher_a_second_signal_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The launcher forwards every signal that the process has received already."""
    with Signals(launched=True) as signals:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert signals.signal_number == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_request_to_save_holds_until_it_is_met() -> None:
    with Signals() as signals:
        for _ in range(2):
            send(signal.SIGUSR1)
            assert signals.save
            signals.saved()
            assert not signals.save
        assert signals.signal_number is None
        send(signal.SIGTERM)  # SIGUSR1 has not used up the first one
        assert signals.signal_number == signal.SIGTERM


def test_one_of_several_ranks_acts_only_on_what_all_have_heard() -> None:
    with Signals(alone=False, launched=True) as signals:
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert signals.received() == [0.0, 1.0, 1.0]
        assert (signals.signal_number, signals.save) == (None, False)
        signals.hear([0.0, 0.0, 0.0])
        assert (signals.signal_number, signals.save) == (None, False)
        signals.hear([0.0, 2.0, 1.0])
        assert (signals.signal_number, signals.save) == (signal.SIGTERM, True)


def test_rank_that_received_nothing_acts_on_the_signals_of_others() -> None:
    with Signals(alone=False, launched=True) as signals:
        signals.hear([1.0, 3.0, 0.0])
        assert (signals.signal_number, signals.save) == (signal.SIGINT, False)
        signals.hear([0.0, 3.0, 0.0])
        assert signals.signal_number == signal.SIGINT  # the first one counts
