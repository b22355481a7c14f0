"""Signals of one process, and of several that must act on them at the same window."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from runtime.signals import Signals

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_second_ctrl_c_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert signals.signal_number is None
        send(signal.SIGINT)
        assert signals.signal_number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_no_process_however_often_they_come(number: signal.Signals) -> None:
    with Signals() as signals:
        for _ in range(3):
            send(number)
        send(signal.SIGUSR1)
        assert (signals.signal_number, signals.save) == (number, True)


def test_closed_terminal_is_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGHUP)
            assert signals.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, before)


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


def test_request_to_save_holds_until_the_run_is_saved() -> None:
    with Signals() as signals:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
            send(number)
            assert signals.save
            signals.saved()
            assert not signals.save
        assert signals.signal_number is None
        send(signal.SIGTERM)
        assert signals.signal_number == signal.SIGTERM


def test_one_of_several_ranks_acts_only_on_what_all_have_heard() -> None:
    with Signals(alone=False, launched=True) as signals:
        nothing = signals.received()
        assert not any(nothing)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert sum(signals.received()) == 2
        assert (signals.signal_number, signals.save) == (None, False)
        signals.hear(nothing)
        assert (signals.signal_number, signals.save) == (None, False)
        signals.hear([2 * count for count in signals.received()])  # another rank has received the same
        assert (signals.signal_number, signals.save) == (signal.SIGTERM, True)


def test_rank_that_received_nothing_acts_on_the_signals_of_others() -> None:
    with Signals(alone=False, launched=True) as other:
        send(signal.SIGTERM)
        received = other.received()
        send(signal.SIGINT)
        both = other.received()
    signals = Signals(alone=False, launched=True)
    signals.hear(received)
    assert (signals.signal_number, signals.save) == (signal.SIGTERM, False)
    signals.hear(both)
    assert signals.signal_number == signal.SIGTERM  # the first one counts


def test_a_run_whose_time_ends_stops_with_enough_of_it_left() -> None:
    """Two per cent are kept back, at least 20 s, and two of the longest windows so far."""
    now = time.monotonic()
    for left, ends in ((19.0, True), (25.0, False)):
        signals = Signals(began=now - 100 + left, seconds=100)
        signals.hear([])
        assert (signals.time_is_up, signals.stop, signals.signal_number) == (ends, ends, None)
    patient = Signals(began=now, seconds=1000)
    patient.hear([])
    assert not patient.stop
    patient._longest = 600.0  # a window of ten minutes: another one would not fit
    patient.hear([])
    assert patient.stop


def test_the_time_of_one_rank_ends_that_of_all() -> None:
    other = Signals(alone=False)
    others_request = Signals(alone=False, began=time.monotonic() - 10, seconds=10).received()
    other.hear([a + b for a, b in zip(other.received(), others_request, strict=True)])
    assert other.time_is_up
