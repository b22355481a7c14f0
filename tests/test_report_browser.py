"""A run's report in headless Chromium, driven by selenium: behaviour that needs the page's script."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, needs_shared, tiny_arguments
from plotly.offline import get_plotlyjs
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from commands.scoring import CURVES
from reporting.comparison import MethodDetails, render_comparison
from reporting.score_table import Row, ScoreTable
from train_ultimate import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (Debian packages)"),
    pytest.mark.xdist_group("browser"),
]

Open = Callable[..., webdriver.Chrome]


@pytest.fixture(scope="module", params=["scenes", pytest.param("photographs", marks=[pytest.mark.slow, needs_shared])])
def page(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    directory = tmp_path_factory.mktemp("browser") / "run"
    flags, dataset = ["--drill", "nan-loss@3", "--drill", "bad-sample@10"], tiny_dataset
    if request.param == "photographs":
        dataset = SHARED / "data" / "CAMO"
        flags = ["--drill", "nan-loss@3", "--drill", "bad-sample@60", "--epochs", "2", "--stage1-epochs", "1"]
    assert main(tiny_arguments(dataset, directory, *flags)) == 0
    return directory / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, page: Path) -> Open:
    """Opens the report at a width and in a colour scheme; returns when its charts are drawn."""

    def open_page(width: int = 1280, scheme: str = "light") -> webdriver.Chrome:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.get_log("browser")
        browser.get("about:blank")  # the same address with another fragment would not be loaded again
        browser.get(page.as_uri())
        charts = len(browser.find_elements(By.CSS_SELECTOR, ".chart"))
        assert charts >= 6
        drawn = (By.CSS_SELECTOR, ".chart[data-drawn]")
        WebDriverWait(browser, 60).until(lambda driver: len(driver.find_elements(*drawn)) == charts)
        return browser

    return open_page


def show(browser: webdriver.Chrome, element: WebElement) -> dict[str, float]:
    """Scroll to an element and return its middle, in window coordinates."""
    script = """arguments[0].scrollIntoView({block: "center", behavior: "instant"});
        const box = arguments[0].getBoundingClientRect();
        return {x: box.left + box.width / 2, y: box.top + box.height / 2};"""
    return browser.execute_script(script, element)


def mouse(browser: webdriver.Chrome, kind: str, at: dict[str, float], **more: Any) -> None:
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **at, **more})


def hover(browser: webdriver.Chrome, at: dict[str, float]) -> str:
    """Move the mouse there and return the text of the label that appears."""
    deadline = time.monotonic() + 20
    while True:
        for shift in (-2, 0):  # a label follows movement
            mouse(browser, "mouseMoved", {"x": at["x"] + shift, "y": at["y"]})
            time.sleep(0.1)
        text = " ".join(label.text for label in browser.find_elements(By.CSS_SELECTOR, ".hoverlayer .hovertext"))
        if text or time.monotonic() > deadline:
            return text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_all_charts_are_drawn_without_an_error_and_nothing_sticks_out(opened: Open, width: int, scheme: str) -> None:
    browser = opened(width, scheme)
    assert browser.get_log("browser") == []
    for chart in browser.find_elements(By.CSS_SELECTOR, ".chart"):
        lines = chart.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace path")
        assert any(len(line.get_attribute("d") or "") > 10 for line in lines), chart.get_attribute("id")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ink = browser.execute_script("return getComputedStyle(document.querySelector('.chart .xtick text')).fill")
    channels = [int(value) for value in ink[4:-1].split(",")]
    assert (max(channels) < 110) if scheme == "light" else (min(channels) > 150)


def test_charts_follow_the_colour_scheme_while_the_page_is_open(opened: Open) -> None:
    browser = opened(scheme="light")
    script = "return getComputedStyle(document.querySelector('.chart .xtick text')).fill"
    before = browser.execute_script(script)
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(script) != before)


def test_hovering_shows_a_windows_values(opened: Open) -> None:
    browser = opened()
    points = browser.find_elements(By.CSS_SELECTOR, "#chart-epoch-loss .scatterlayer .trace .point")
    text = hover(browser, show(browser, points[0]))
    assert text.startswith("loss")
    line = browser.find_element(By.CSS_SELECTOR, "#chart-window-loss .scatterlayer .js-line")
    script = """const line = arguments[0], [x, y] = line.getAttribute("d").split("L")[1].split(",").map(Number);
        const at = new DOMPoint(x, y).matrixTransform(line.getScreenCTM());
        return {x: at.x, y: at.y};"""
    show(browser, line)
    assert "epoch 1, window 2" in hover(browser, browser.execute_script(script, line))


def test_clicking_an_incidents_mark_or_link_leads_to_its_entry(opened: Open) -> None:
    browser = opened()
    (trace,) = [
        trace
        for trace in browser.find_elements(By.CSS_SELECTOR, "#chart-window-loss .scatterlayer .trace")
        if trace.find_elements(By.CSS_SELECTOR, ".point[style*='rgb(239, 68, 68)']")
    ]
    marks = trace.find_elements(By.CSS_SELECTOR, ".point")
    assert len(marks) == 2
    at = show(browser, marks[1])
    assert "bad" in hover(browser, at) or "quarantined" in hover(browser, at)
    for kind in ("mousePressed", "mouseReleased"):
        mouse(browser, kind, at, button="left", clickCount=1)
    WebDriverWait(browser, 20).until(lambda driver: driver.current_url.endswith("#incident-000002"))
    link = browser.find_element(By.CSS_SELECTOR, "#chart-gradient-norm .annotation a")
    at = show(browser, link)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        mouse(browser, kind, at, **({} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}))
    WebDriverWait(browser, 20).until(lambda driver: driver.current_url.endswith("#incident-000001"))
    entry = browser.find_element(By.CSS_SELECTOR, "article:target")
    assert "nonfinite loss, epoch 1, window 3" in entry.text
    top = browser.execute_script("return arguments[0].getBoundingClientRect().top", entry)
    assert 0 <= top < 900


def test_the_keyboard_skips_the_navigation_and_opens_a_data_table(opened: Open) -> None:
    browser = opened()
    browser.switch_to.active_element.send_keys("\ue004")  # tab
    assert browser.switch_to.active_element.text == "Skip to the content"
    browser.switch_to.active_element.send_keys("\ue007")  # enter
    assert browser.switch_to.active_element.get_attribute("id") == "main"
    summary = browser.find_element(By.CSS_SELECTOR, "#charts summary")
    summary.send_keys("\ue007")
    table = browser.find_element(By.CSS_SELECTOR, "#charts table")
    WebDriverWait(browser, 20).until(lambda _: table.is_displayed())
    assert "IoU" in table.text


def test_a_click_on_a_title_sorts_a_table_of_compare(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Highest first, then lowest first; a method without a number comes last of the highest."""
    scores = {"low": {"s_measure": [0.5]}, "high": {"s_measure": [0.9, 0.7]}, "none": {"mae": [0.1]}}
    rows = [Row(name, {"CAMO": values}) for name, values in scores.items()]
    table = ScoreTable({"CAMO": 3}, {"s_measure": "S", "mae": "MAE"}, rows)
    flat = {kind: np.linspace(0, 1, 256) for kind in CURVES}
    method = MethodDetails("low", {"CAMO": flat}, {"CAMO": {}}, {"CAMO": {"a": 0.5}})
    (tmp_path / "page.html").write_text(render_comparison(table, [], [method], [], get_plotlyjs()))
    browser.get((tmp_path / "page.html").as_uri())
    title = browser.find_element(By.CSS_SELECTOR, "table.sortable button")
    orders = []
    for _ in range(2):
        title.click()
        orders.append([head.text for head in browser.find_elements(By.CSS_SELECTOR, "table.sortable tbody th")])
    assert orders == [["high", "low", "none"], ["none", "low", "high"]]
    assert not browser.get_log("browser")
