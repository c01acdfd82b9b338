"""A report in a real browser: Chromium, headless, with its driver.

Skipped where there is none. Debian has them in the packages chromium and chromium-driver; INFOBATCH_CHROMIUM names
another one, whose chromedriver lies beside it or on the PATH.
"""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.reported import HOSTILE, write_tars

from benchmarks.report_page import make_store
from infobatch_stream.report.dataset import open_shards
from infobatch_stream.report.page import write

SAMPLES = 300
PHONE = 390


def find_chromium():
    named = os.environ.get("INFOBATCH_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(names)}); INFOBATCH_CHROMIUM may name one")
    driver = shutil.which("chromedriver", path=str(Path(found).parent)) or shutil.which("chromedriver")
    if driver is None:
        pytest.skip(f"{found} has no chromedriver beside it, and none is on the PATH (Debian: chromium-driver)")
    return found, driver


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra 'test'")
    chromium, driver = find_chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]  # of its own
    for flag in (*flags, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with pictures, texts that would like to be markup, and recorded losses."""
    folder = tmp_path_factory.mktemp("report")
    samples = []
    for i in range(SAMPLES):
        stream = io.BytesIO()
        Image.new("RGB", (40, 30), (i % 256, 90, 200)).save(stream, "PNG")
        samples.append((f"k{i:04}", {"png": stream.getvalue(), "txt": HOSTILE.encode(), "cls": b"%d" % (i % 5)}))
    shards = write_tars(folder / "shards", samples)
    (shards / "classes.json").write_text(json.dumps(["one", HOSTILE, "three", "w" * 70, "five"]))
    make_store(folder / "scores.zarr", SAMPLES, 8, fingerprint=open_shards(str(shards)).fingerprint)
    write(folder / "scores.zarr", folder / "report.html", dataset=str(shards), count=12)
    return folder / "report.html"


def show(browser, page, *, width=1280, dark=False, script=True, fragment=""):
    """Open the page anew; what was logged before is forgotten."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    browser.get(page.as_uri() + fragment)


def picture(browser):
    """float64[height, width, 3] of what is to be seen."""
    data = base64.b64decode(browser.get_screenshot_as_base64())
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)


def sign(browser):
    """The last point of a gallery sample that is shown: no other lies over it."""
    return [link for link in browser.find_elements("css selector", "svg a[data-sample]") if link.is_displayed()][-1]


def test_a_report_renders_without_errors_and_asks_for_nothing(browser, page):
    show(browser, page)
    assert browser.title == "scores.zarr: score report"
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()]
    broken = "return [...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert browser.execute_script(f"for (const i of document.images) i.loading = 'eager'; {broken}") == 0
    assert browser.execute_script("return document.querySelectorAll('svg path').length") > 50


def test_a_click_on_a_point_shows_its_sample_beside_the_chart_and_marks_it(browser, page):
    show(browser, page)
    link = sign(browser)
    sample = link.get_attribute("data-sample")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", link)
    link.click()
    chosen = browser.find_element("id", "chosen")
    assert f"#{sample}" in chosen.text
    assert chosen.find_element("tag name", "img").is_displayed()
    marked = browser.find_elements("css selector", ".chosen")
    assert {part.get_attribute("data-sample") for part in marked} == {sample}
    assert {part.tag_name for part in marked} >= {"article", "a", "path"}
    chosen.find_element("css selector", f'a[href="#sample-{sample}"]').click()
    assert browser.current_url.endswith(f"#sample-{sample}")


def test_a_point_is_reached_and_followed_by_the_keyboard(browser, page):
    show(browser, page)
    link = sign(browser)
    browser.execute_script("arguments[0].focus()", link)
    assert browser.switch_to.active_element == link
    link.send_keys("\ue007")  # Enter
    assert f"#{link.get_attribute('data-sample')}" in browser.find_element("id", "chosen").text


def test_without_scripts_a_point_leads_to_its_sample_which_is_marked(browser, page):
    show(browser, page, script=False)
    link = sign(browser)
    sample = link.get_attribute("data-sample")
    link.send_keys("\ue007")
    assert browser.current_url.endswith(f"#sample-{sample}")
    assert browser.find_element("css selector", "article:target").get_attribute("data-sample") == sample


def test_a_link_to_a_sample_marks_it(browser, page):
    show(browser, page)
    sample = sign(browser).get_attribute("data-sample")
    show(browser, page, fragment=f"#sample-{sample}")
    assert browser.find_element("css selector", "article.chosen").get_attribute("id") == f"sample-{sample}"


@pytest.mark.parametrize("width", [PHONE, 320, 760, 1280])
def test_nothing_is_wider_than_the_screen_and_no_label_is_cut(browser, page, width):
    show(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    cut = browser.execute_script(
        "return [...document.querySelectorAll('.chart text, h1, h2, h3, h4, p, dd')]"
        ".filter((part) => part.getClientRects().length && !part.closest('.skip'))"
        ".map((part) => [part.getBoundingClientRect(), part.textContent])"
        ".filter(([box]) => box.left < -0.5 || box.right > innerWidth + 0.5).map(([, text]) => text)"
    )
    assert cut == []


def test_text_in_charts_can_be_read_on_a_phone(browser, page):
    show(browser, page, width=PHONE)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.chart text')].filter((part) => part.getClientRects().length)"
        ".map((part) => part.getBoundingClientRect().height)"
    )
    assert len(heights) > 20
    assert min(heights) > 11  # of a line; letters of 10 pixels or more


def test_dark_mode_has_light_text_on_a_dark_ground(browser, page):
    shown = {}
    for dark in (False, True):
        show(browser, page, dark=dark)
        shown[dark] = picture(browser)
    assert shown[False].mean() > 200
    assert shown[True].mean() < 70
    assert shown[True].max() > 200


def test_markup_in_the_data_does_not_run(browser, page):
    show(browser, page)
    assert HOSTILE in browser.find_element("id", "galleries").text
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    assert browser.execute_script("return document.querySelectorAll('[onerror]').length") == 0
    # And if it were in the page, the browser would refuse it.
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.ran = 1';"
        "document.body.append(script)"
    )
    assert browser.execute_script("return window.ran") is None
