import math
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from test_history import epoch, log_of, saved, start, window

from reporting.charts import MOST_POINTS, charts_of, thin
from reporting.history import RunHistory, read_run


@pytest.fixture
def run(tmp_path: Path) -> RunHistory:
    limits = ["inf"] * 4 + [5.0] * 4
    windows = [window(1, n, 2 - n / 10, spike_limit=limit) for n, limit in enumerate(limits, start=1)]
    events = [start(backbone_lr_scale=0.1), *windows]
    incident = {"event": "incident", "folder": "000001", "epoch": 1, "window": 4, "verdict": "spike", "action": "skip"}
    events += [incident, epoch(1, 0.4), saved("best_model.pth"), saved("epoch_0001.pth"), window(2, 1, "nan")]
    return read_run(log_of(tmp_path / "run", *events))


def test_thinning_keeps_ends_extremes_and_non_finite_values() -> None:
    values = np.sin(np.arange(100_000) / 50)
    values[[31_234, 77_777]] = 40, -40
    values[55_555] = math.nan
    kept = thin(values)
    assert len(kept) <= MOST_POINTS
    assert {0, 31_234, 55_555, 77_777, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert len(thin(values[:100])) == 100


def test_plotly_accepts_every_chart_and_each_has_its_table(run: RunHistory) -> None:
    charts = charts_of([run], ["run"])
    keys = {chart.key for chart in charts}
    assert {"scores", "epoch-loss", "window-loss", "gradient-norm", "learning-rates"} <= keys
    for chart in charts:
        go.Figure(chart.figure)  # raises for an unknown property
        assert chart.table.rows
        assert all(len(row) == len(chart.table.columns) for row in chart.table.rows)


def test_incidents_and_checkpoints_are_marked_where_they_were(run: RunHistory) -> None:
    charts = {chart.key: chart.figure for chart in charts_of([run], ["run"])}
    traces = {trace["name"]: trace for trace in charts["window-loss"]["data"]}
    assert (traces["incidents"]["x"], traces["incidents"]["customdata"]) == ([4], ["incident-000001"])
    assert traces["checkpoints"]["x"] == [8]
    assert traces["loss"]["y"][-1] is None  # a gap
    assert '<a href="#incident-000001"' in charts["window-loss"]["layout"]["annotations"][0]["text"]


def test_the_chart_of_norms_shows_clip_and_spike_limits(run: RunHistory) -> None:
    (chart,) = (chart for chart in charts_of([run], ["run"]) if chart.key == "gradient-norm")
    traces = {trace["name"]: trace["y"] for trace in chart.figure["data"]}
    assert traces["--grad-clip"] == [0.5, 0.5]
    assert traces["spike limit"] == [None] * 4 + [5.0] * 4 + [None]  # gaps: no history, not in the log
    assert "Above the spike limit" in chart.description


def test_logs_without_spike_limits_have_no_line_for_them(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), *(window(1, number) for number in range(1, 9))))
    (chart,) = (chart for chart in charts_of([run], ["run"]) if chart.key == "gradient-norm")
    assert "spike limit" not in {trace["name"] for trace in chart.figure["data"]}
    assert "spike limit" not in chart.description


def test_marks_of_incidents_keep_the_names_of_files(tmp_path: Path) -> None:
    incident = {"event": "incident", "folder": "000001", "epoch": 1, "window": 1}
    incident |= {"verdict": "nonfinite_loss", "action": "applied without a_b.jpg"}
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1), incident))
    (figure,) = (chart.figure for chart in charts_of([run], ["run"]) if chart.key == "window-loss")
    (marks,) = (trace for trace in figure["data"] if trace["name"] == "incidents")
    assert marks["text"] == ["nonfinite loss: applied without a_b.jpg"]


def test_incidents_side_by_side_share_a_link(tmp_path: Path) -> None:
    windows = [window(1, number) for number in range(1, 101)]
    found = [{"event": "incident", "folder": f"{n:06d}", "epoch": 1, "window": n} for n in (10, 11, 12, 90)]
    run = read_run(log_of(tmp_path / "run", start(), *windows, *found))
    (figure,) = (chart.figure for chart in charts_of([run], ["run"]) if chart.key == "window-loss")
    assert [note["x"] for note in figure["layout"]["annotations"]] == [10, 90]


def test_the_running_mean_leaves_out_windows_that_were_not_applied(tmp_path: Path) -> None:
    windows = [window(1, number, grad_norm=2.0) for number in range(1, 151)]
    windows[119] = window(1, 120, grad_norm=1e6, verdict="spike")
    run = read_run(log_of(tmp_path / "run", start(), *windows))
    (figure,) = (chart.figure for chart in charts_of([run], ["run"]) if chart.key == "gradient-norm")
    traces = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert max(traces["norm"]) == 1e6
    assert set(traces["norm, mean over 50"]) == {2.0}


def test_the_loss_scale_has_a_chart_if_it_ever_differs_from_one(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1, loss_scale=1024.0), window(1, 2, loss_scale=512.0)))
    (chart,) = (chart for chart in charts_of([run], ["run"]) if chart.key == "loss-scale")
    assert chart.figure["data"][0]["y"] == [1024, 512]


def test_several_runs_share_each_chart(run: RunHistory) -> None:
    charts = {chart.key: chart for chart in charts_of([run, run], ["a", "b"])}
    assert {"iou", "dice", "s_measure"} <= charts.keys()
    assert [trace["name"] for trace in charts["iou"].figure["data"]] == ["a", "b"]
    assert charts["iou"].table.columns[0] == "run"


def test_a_run_that_has_trained_nothing_yet_has_no_charts(tmp_path: Path) -> None:
    assert charts_of([read_run(log_of(tmp_path / "run", start()))], ["run"]) == []
