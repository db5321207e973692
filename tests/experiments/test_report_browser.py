"""The report in a real browser: no errors, fits its window, the viewer scrolls and switches."""

import io
import os
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import sync_playwright

from experiments.reporting.page import write_report
from experiments.run_folder import RunFolder
from tests.experiments.fake_run import keep_one_figure, make_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

DRAWN = "document.getElementById('slice-output').textContent"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("the checks must run with a browser; install chromium")
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(
        RunFolder(make_run(tmp_path_factory.mktemp("browser") / "run", num_folds=2))
    )


@pytest.fixture
def open_page(browser, report):
    """Open the report; whatever it asks of the network or complains of fails the test."""
    pages, faults = [], []

    def open_at(width, scheme="light", *, file=report, waiting_for=DRAWN, **options):
        page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        pages.append(page)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:")) else faults.append(request.url)
            ),
        )
        page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_function(waiting_for)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert faults == []


def picture(page):
    """A fingerprint of what the canvas shows, once it has been drawn."""
    page.wait_for_timeout(60)
    return page.evaluate("document.getElementById('slice-canvas').toDataURL()")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window_in_both_schemes(open_page, width, scheme):
    page = open_page(width, scheme)
    overflow, background = page.evaluate(
        "[document.documentElement.scrollWidth - innerWidth,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    assert overflow <= 0
    assert (background == "rgb(17, 21, 24)") == (scheme == "dark")
    canvas = page.locator("#slice-canvas").bounding_box()
    assert canvas["width"] > 0.6 * min(width, 1120) - 200
    assert canvas["x"] >= 0
    assert canvas["x"] + canvas["width"] <= width


def test_viewer_scrolls_by_keyboard_wheel_and_slider(open_page):
    page = open_page(1280)
    canvas, output = page.locator("#slice-canvas"), page.locator("#slice-output")
    start = int(output.inner_text().split()[0])
    shown = picture(page)
    canvas.focus()
    page.keyboard.press("ArrowUp")
    assert picture(page) != shown
    assert output.inner_text() == f"{start + 1} of 8"
    page.keyboard.press("ArrowDown")
    assert picture(page) == shown
    canvas.click()
    page.mouse.wheel(0, 100)
    page.wait_for_timeout(60)
    assert output.inner_text() == f"{start - 1} of 8"
    page.locator("#slice-range").fill("7")
    page.wait_for_timeout(60)
    assert output.inner_text() == "8 of 8"
    canvas.focus()
    page.keyboard.press("ArrowUp")  # there is no further slice
    page.wait_for_timeout(60)
    assert output.inner_text() == "8 of 8"


def test_layers_modalities_and_cases_switch(open_page):
    page = open_page(1280)
    shown = [picture(page)]
    for name in ("truth", "prediction", "probability"):
        page.locator(f"#layer-{name}").click()
        shown.append(picture(page))
    for option in ("t2w|0", "t2w|1"):
        page.locator("#layer-attention").select_option(option)
        shown.append(picture(page))
    page.get_by_role("radio", name="ADC").check()
    shown.append(picture(page))
    page.locator("#viewer-case").select_option(index=2)
    shown.append(picture(page))
    assert len(set(shown)) == len(shown)
    assert len(page.locator("#layer-attention option").all()) == 1 + 3 * 2
    assert "Worst" in page.locator("#viewer-caption").inner_text()


def test_keys_switch_layers_and_back(open_page):
    page = open_page(400)
    page.locator("#slice-canvas").focus()
    shown = picture(page)
    for key, times in (("t", 2), ("p", 2), ("o", 2), ("m", 3), ("a", 7)):
        page.keyboard.press(key)
        assert picture(page) != shown
        for _ in range(times - 1):
            page.keyboard.press(key)
        assert picture(page) == shown


def test_page_prints_without_controls(open_page):
    page = open_page(1280)
    page.emulate_media(media="print")
    assert not page.locator(".viewer .controls").is_visible()
    assert page.locator("svg.panel").first.is_visible()
    assert len(page.pdf()) > 10_000


def test_every_table_fits_a_printed_page(open_page):
    page = open_page(676)  # A4 without its margins
    page.emulate_media(media="print")
    page.evaluate("document.querySelector('#cases tbody th').textContent = 'patient'.repeat(12)")
    tables = page.evaluate(
        """[...document.querySelectorAll(".scroll")].map((table) => [
            table.querySelector("caption").textContent, getComputedStyle(table).overflowX,
            table.scrollWidth - table.clientWidth, table.scrollHeight - table.clientHeight])"""
    )
    assert "Every case" in [title for title, *_ in tables]
    for table in tables:
        assert table[1:] == ["visible", 0, 0]
    assert page.evaluate("document.documentElement.scrollWidth") == 676


def test_slices_of_a_tall_grid_are_shown_where_one_column_would_be_too_high(open_page, tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    depth = 700
    # 70000 rows one by one; the slices brighten from 0 to 255
    ramp = np.linspace(1, 2, depth)[:, None, None]
    keep_one_figure(run, np.broadcast_to(ramp, (depth, 100, 40)))
    page = open_page(1280, file=write_report(RunFolder(run)))
    page.locator("#slice-canvas").scroll_into_view_if_needed()
    for index in (1, 26, 27, 350, 699):
        page.locator("#slice-range").fill(str(index))
        page.wait_for_timeout(60)
        assert page.locator("#slice-output").inner_text() == f"{index + 1} of {depth}"
        shown = PIL.Image.open(io.BytesIO(page.locator("#slice-canvas").screenshot()))
        red, green, blue = shown.convert("RGB").getpixel((shown.width // 2, 10))
        assert red == green == blue
        assert abs(red - 255 * np.clip((index / (depth - 1) - 0.01) / 0.985, 0, 1)) < 4


def test_a_layer_that_cannot_be_decoded_is_said(open_page, report, tmp_path):
    broken = tmp_path / "report.html"
    text = report.read_text("utf-8")
    text = re.sub(r'("prediction": "data:image/png;base64,)[^"]*', r"\1AAAA", text)
    broken.write_text(text, "utf-8")
    page = open_page(1280, file=report)
    assert not page.locator("#viewer-fault").is_visible()
    page = open_page(1280, file=broken, waiting_for="document.getElementById('viewer-fault')")
    fault = page.get_by_role("alert")
    fault.wait_for(state="visible")
    assert fault.inner_text() == (
        "This browser cannot show one of the chosen layers. Choose others, or open the page in "
        "another browser."
    )
    assert not page.evaluate(
        "document.getElementById('slice-canvas').getContext('2d')"
        ".getImageData(0, 0, 99, 99).data.some(Boolean)"
    )
    page.locator("#layer-prediction").uncheck()
    page.wait_for_function(DRAWN)
    assert not fault.is_visible()


def test_page_can_be_read_without_javascript(open_page):
    page = open_page(1280, java_script_enabled=False)
    assert page.get_by_text("The viewer needs JavaScript").is_visible()
    assert page.locator("svg.panel").first.is_visible()
