"""The cores and loader processes that a rank may use."""

from pathlib import Path

import pytest

from data.processes import default_num_workers, num_cores


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_num_workers(cores=32) == 8
    assert default_num_workers(cores=4) == 3
    assert default_num_workers(cores=1) == 1
    assert 1 <= default_num_workers() <= 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_num_workers(cores=32) == 3


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
def test_a_containers_cpu_limit_counts(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    bound = num_cores(tmp_path / "none")
    assert bound >= 1
    assert num_cores(tmp_path) == (bound if limit is None else min(bound, limit))
