"""The report in a real browser: no errors, fits its window, the viewer scrolls and switches."""

import io
import os
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import scipy
from playwright.sync_api import sync_playwright

from experiments.reporting.page import write_report
from experiments.run_folder import RunFolder
from tests.experiments.fake_run import keep_one_figure, make_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

DRAWN = "document.getElementById('viewer-panes').dataset.drawn !== undefined"


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


def settled(page):
    """Wait until what was asked for is drawn."""
    page.wait_for_timeout(40)
    page.wait_for_function(DRAWN)
    page.evaluate("() => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")


def picture(page, place=0):
    """A fingerprint of what a picture shows, once it has been drawn."""
    settled(page)
    return page.locator("#viewer-panes canvas").nth(place).evaluate("(c) => c.toDataURL()")


def words(page, name):
    settled(page)
    return page.locator(f"#{name}").inner_text()


def rectangle(page, place=0):
    page.locator("#viewer-panes").scroll_into_view_if_needed()
    return page.locator("#viewer-panes canvas").nth(place).bounding_box()


def drag(page, by, *, place=0, button="left"):
    """Press in the middle of a picture, and release it elsewhere."""
    box = rectangle(page, place)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down(button=button)
    page.mouse.move(x + by[0], y + by[1], steps=3)
    page.mouse.up(button=button)
    settled(page)


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
    canvases = [each.bounding_box() for each in page.locator("#viewer-panes canvas").all()]
    assert len(canvases) == (3 if width == 1280 else 1)  # one at a time where there is no room
    assert sum(box["width"] for box in canvases) > 0.9 * width - 30
    assert canvases[0]["x"] >= 0
    assert canvases[-1]["x"] + canvases[-1]["width"] <= width


def test_slices_by_keys_wheel_and_slider(open_page):
    page = open_page(1280)
    panes = page.locator("#viewer-panes")
    start = int(words(page, "slice-output").split()[0])
    shown = picture(page)
    panes.focus()
    page.keyboard.press("ArrowUp")
    assert picture(page) != shown
    assert words(page, "slice-output") == f"{start + 1} of 8"
    page.keyboard.press("ArrowDown")
    assert picture(page) == shown
    page.evaluate("document.activeElement.blur()")
    box = rectangle(page)
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 60)  # the page is scrolled until a picture was clicked
    page.wait_for_function(f"scrollY > {before}")
    assert words(page, "slice-output") == f"{start} of 8"
    panes.click(position={"x": 30, "y": 60})
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 100)
    assert words(page, "slice-output") == f"{start - 1} of 8"
    assert page.evaluate("scrollY") == before
    page.locator("#slice-range").fill("7")
    assert words(page, "slice-output") == "8 of 8"
    panes.focus()
    page.keyboard.press("ArrowUp")  # there is no further slice
    assert words(page, "slice-output") == "8 of 8"
    page.keyboard.press("Home")
    assert words(page, "slice-output") == "1 of 8"
    page.keyboard.press("PageUp")
    assert words(page, "slice-output") == "6 of 8"


def test_layers_layouts_and_cases_switch(open_page):
    page = open_page(1280)
    shown = [picture(page)]
    for name in ("truth", "prediction", "probability"):
        page.locator(f"#layer-{name}").click()
        shown.append(picture(page))
    for option in ("|0", "t2w|1"):
        page.locator("#layer-attention").select_option(option)
        shown.append(picture(page))
    page.locator("#opacity-attention").fill("20")
    shown.append(picture(page))
    page.locator("#opacity-probability").fill("20")
    shown.append(picture(page))
    page.locator("#viewer-layout").get_by_text("ADC").click()
    assert page.locator("#viewer-panes canvas").count() == 1
    shown.append(picture(page))
    page.locator("#viewer-case").select_option(index=2)
    shown.append(picture(page))
    assert len(set(shown)) == len(shown)
    assert page.locator("#layer-attention option").count() == 1 + 2 + 3 * 2
    assert "Dice" in page.locator("#viewer-caption").inner_text()
    page.get_by_text("Side by side", exact=True).click()
    assert len({picture(page, place) for place in range(3)}) == 3


def test_keys_switch_layers_and_back(open_page):
    page = open_page(400)
    page.locator("#viewer-panes").focus()
    shown = picture(page)
    for key, times in (("t", 2), ("p", 2), ("o", 2), ("a", 9), ("m", 4), ("i", 2)):
        page.keyboard.press(key)
        assert picture(page) != shown, key
        for _ in range(times - 1):
            page.keyboard.press(key)
        assert picture(page) == shown, key
    page.keyboard.press("3")
    assert page.locator("#viewer-layout input:checked").get_attribute("value") == "hbv"
    page.keyboard.press("?")
    assert page.get_by_text("next lesion, lesion before").is_visible()


def test_dragging_sets_the_window_of_the_picture_it_is_in(open_page):
    page = open_page(1280)
    first, other = picture(page), picture(page, 1)
    drag(page, (80, 0))
    wider = picture(page)
    assert wider != first
    drag(page, (0, 60), place=1)
    assert picture(page, 1) != other
    assert picture(page) != first  # the other one's window is its own
    page.locator("#viewer-panes").focus()
    page.keyboard.press("r")
    page.mouse.move(5, 5)
    assert [picture(page), picture(page, 1)] == [first, other]
    page.keyboard.press("Shift+ArrowRight")  # the tool by keys
    assert picture(page, 1) != other


def test_zoom_and_pan_go_together_in_all_pictures(open_page):
    page = open_page(1280)
    page.locator("#viewer-panes").focus()
    start = [picture(page, place) for place in range(3)]

    def changed(*, back="r"):
        now = [picture(page, place) for place in range(3)]
        assert all(a != b for a, b in zip(now, start, strict=True))
        page.mouse.move(5, 5)
        page.keyboard.press(back)
        assert [picture(page, place) for place in range(3)] == start

    page.keyboard.press("+")
    changed()
    page.get_by_text("Zoom", exact=True).click()
    page.locator("#viewer-panes").focus()
    drag(page, (0, -80))
    changed()
    drag(page, (0, -60), button="right")
    changed()
    page.keyboard.press("h")
    assert page.locator("#viewer-tools input:checked").get_attribute("value") == "pan"
    drag(page, (60, 20))
    changed()
    drag(page, (60, 20), button="middle")
    changed()
    page.keyboard.press("Shift+ArrowLeft")
    changed()
    box = rectangle(page)
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    changed(back="0")
    page.keyboard.press("+")
    page.locator("#viewer-panes canvas").first.dblclick(position={"x": 50, "y": 50})
    page.mouse.move(5, 5)
    assert picture(page) == start[0]


def test_voxels_are_read_where_the_pointer_is(open_page, tmp_path):
    """A picture whose values say where they are."""
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    d, h, w = np.meshgrid(np.arange(4), np.arange(20), np.arange(40), indexing="ij")
    keep_one_figure(run, 1.0 + d + h / 100 + w)
    page = open_page(1280, file=write_report(RunFolder(run)))
    page.locator("#slice-range").fill("2")
    box = rectangle(page)
    scale = min(box["width"] / 40, box["height"] / 20)
    left = box["x"] + box["width"] / 2 - 20 * scale
    top = box["y"] + box["height"] / 2 - 10 * scale
    page.mouse.move(left + 10.5 * scale, top + 14.5 * scale)
    said = words(page, "viewer-voxel")
    assert said.startswith("column 11, row 15, slice 3: T2W ")
    value = float(re.search(r"T2W (\S+),", said)[1])
    assert value == pytest.approx(1 + 2 + (20 - 15) / 100 + 40 - 11, abs=0.2)
    page.locator("#viewer-panes").focus()
    page.keyboard.press("c")
    page.keyboard.press("Shift+ArrowRight")
    assert words(page, "viewer-voxel").startswith("column 12, row 15, slice 3")
    page.mouse.move(5, 5)
    assert words(page, "viewer-voxel").startswith("column 12")  # the cursor stays
    page.mouse.move(left + 24.5 * scale, top + 12.5 * scale)
    page.mouse.down()
    page.mouse.up()
    assert "probability 0.90, in the truth, in the prediction" in words(page, "viewer-voxel")


def lines_of(page, name, other):
    """Share of the way around a mask that is drawn in its colour, and whether in one piece."""
    page.locator(f"#layer-{other}").uncheck()
    settled(page)
    color = page.evaluate(
        f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
    )
    shown = PIL.Image.open(io.BytesIO(page.locator("#viewer-panes canvas").first.screenshot()))
    pixels = np.asarray(shown.convert("RGB")).astype(int)
    wanted = [int(color.strip()[i : i + 2], 16) for i in (1, 3, 5)]
    lit = (abs(pixels - wanted).sum(-1) < 60).astype(np.uint8)
    page.locator(f"#layer-{other}").check()
    return scipy.ndimage.label(lit, np.ones((3, 3)))[1]


def test_truth_and_prediction_differ_in_style_not_only_in_colour(open_page, tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    keep_one_figure(run, np.ones((4, 40, 40)))
    page = open_page(1280, file=write_report(RunFolder(run)))
    assert lines_of(page, "truth", "prediction") <= 2
    assert lines_of(page, "prediction", "truth") > 10


def test_rows_of_lists_open_cases_and_lesions(open_page):
    page = open_page(1280)
    rows = page.locator("#lesions tbody tr[data-slice]")
    row = rows.nth(1)
    case, where = row.get_attribute("data-case"), int(row.get_attribute("data-slice"))
    row.get_by_role("button").click()
    assert words(page, "slice-output").startswith(f"{where + 1} of")
    assert case in words(page, "viewer-caption")
    assert words(page, "viewer-lesion").startswith(f"2 of {rows.count()}: ")
    assert "open" in row.get_attribute("class")
    assert page.evaluate("document.activeElement.id") == "viewer-panes"
    page.keyboard.press("k")
    assert words(page, "viewer-lesion").startswith("1 of")
    page.keyboard.press("l")
    page.keyboard.press("l")
    assert words(page, "viewer-lesion").startswith("3 of")
    page.keyboard.press("n")
    chosen = page.locator("#viewer-case").input_value()
    row = page.locator("#cases tbody tr").nth(2)
    row.click()
    assert row.get_attribute("data-case") in words(page, "viewer-caption")
    page.keyboard.press("b")
    assert page.locator("#viewer-case").input_value() != chosen
    unopened = page.locator("#cases tbody tr").filter(has_not=page.get_by_role("button"))
    assert unopened.count() == 6  # of these the run kept no pictures


def test_lists_are_sorted_and_filtered(open_page):
    page = open_page(1280)
    table = page.locator("#cases table")

    def column(index):
        cells = table.locator(f"tbody tr:visible > :nth-child({index + 1})").all_inner_texts()
        return [cell.replace("\u2212", "-") for cell in cells]

    table.locator("th button").nth(2).click()
    dice = column(2)
    known = [float(cell) for cell in dice if cell != "–"]  # noqa: RUF001
    assert known == sorted(known)
    assert dice[len(known) :] == ["–"] * (12 - len(known))  # noqa: RUF001
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("Dice")
    table.locator("th button").nth(2).click()
    assert [float(cell) for cell in column(2)[: len(known)]] == known[::-1]
    field = page.get_by_label("Filter: Every case")
    field.fill("dice < 0.5")
    assert column(2) == dice[: sum(score < 0.5 for score in known)][::-1]
    tools = page.locator(".list-tools").nth(1)
    assert tools.locator("output").inner_text() == f"{len(column(2))} of 12"
    field.fill("fold = 1, case_101")
    assert column(0) == ["case_101"]
    page.get_by_label("Filter: Lesions").fill("false")
    kinds = page.locator("#lesions tbody tr:visible td:nth-child(2)").all_inner_texts()
    assert {*kinds} <= {"false", "false, faint"}
    assert kinds


@pytest.mark.parametrize("width", [400, 1280])
def test_everything_is_reached_by_keys(open_page, width):
    page = open_page(width)
    page.locator("#viewer-case").focus()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    for name in ("viewer-layout", "viewer-tool", "viewer-panes", "slice-range", "layer-truth",
                 "opacity-fill", "layer-attention"):  # fmt: skip
        assert name in reached
    page.locator("#lesions tbody button").first.focus()
    page.keyboard.press("Enter")
    assert words(page, "viewer-lesion").startswith("1 of")


def test_two_fingers_zoom(open_page):
    page = open_page(400, has_touch=True)
    shown = picture(page)
    page.evaluate(
        """() => {
          const canvas = document.querySelector("#viewer-panes canvas");
          const box = canvas.getBoundingClientRect();
          const send = (kind, id, x, y) => canvas.dispatchEvent(new PointerEvent(kind, {
            pointerId: id, clientX: box.x + x, clientY: box.y + y, bubbles: true }));
          const panes = document.getElementById("viewer-panes");
          panes.setPointerCapture = () => {};
          send("pointerdown", 11, 100, 100);
          send("pointerdown", 12, 140, 100);
          send("pointermove", 12, 220, 100);
          send("pointerup", 11, 100, 100);
          send("pointerup", 12, 220, 100);
        }"""
    )
    assert picture(page) != shown


def test_page_prints_without_controls(open_page):
    page = open_page(1280)
    page.emulate_media(media="print")
    assert not page.locator("#viewer-app").is_visible()
    assert not page.locator(".list-tools").first.is_visible()
    assert page.locator("svg.panel").first.is_visible()
    assert page.locator("#lesions table").is_visible()
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
    rectangle(page)
    for index in (1, 26, 27, 350, 699):
        page.locator("#slice-range").fill(str(index))
        assert words(page, "slice-output") == f"{index + 1} of {depth}"
        shown = PIL.Image.open(io.BytesIO(page.locator("#viewer-panes canvas").screenshot()))
        red, green, blue = shown.convert("RGB").getpixel((shown.width // 2 + 20, 40))
        assert red == green == blue
        assert abs(red - 255 * np.clip((index / (depth - 1) - 0.01) / 0.985, 0, 1)) < 4


def test_a_layer_that_cannot_be_decoded_is_said(open_page, report, tmp_path):
    broken = tmp_path / "report.html"
    text = report.read_text("utf-8")
    text = re.sub(r'("prediction": {"uri": "data:image/png;base64,)[^"]*', r"\1AAAA", text)
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
    page.locator("#layer-prediction").uncheck()
    settled(page)
    assert not fault.is_visible()


def test_page_can_be_read_without_javascript(open_page):
    page = open_page(1280, java_script_enabled=False)
    assert page.get_by_text("The viewer needs JavaScript").is_visible()
    assert not page.locator("#viewer-app").is_visible()
    assert page.locator("#lesions table").is_visible()
    assert page.locator("svg.panel").first.is_visible()
