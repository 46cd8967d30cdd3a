"""The page in a browser: Chromium without a window, wherever it and its driver are installed."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.report.conftest import Made

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no browser here: Debian's are chromium and chromium-driver", allow_module_level=True
    )
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

VIEWS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=VIEWS)
def page(request: pytest.FixtureRequest, browser: Any, made: Made) -> Any:
    """The browser with the page open, in each view."""
    width, scheme = VIEWS[request.param]
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(made[0].as_uri())
    return browser


def test_nothing_is_fetched_and_nothing_goes_wrong(page: Any, made: Made) -> None:
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert made[0].as_uri() in sent
    assert [url for url in sent if not url.startswith(("data:", made[0].as_uri()))] == []


def test_every_plot_is_there(page: Any, made: Made) -> None:
    report = made[1]
    sizes = page.execute_script(
        """return [...document.querySelectorAll('figure')].map(figure => {
            const box = figure.querySelector('svg').getBoundingClientRect();
            const shapes = [...figure.querySelectorAll('path, use')].filter(shape => {
                const drawn = shape.getBoundingClientRect();
                return drawn.width > 0 || drawn.height > 0;
            });
            return [figure.getAttribute('aria-label'), box.width, box.height, shapes.length];
        })"""
    )
    kinds = len(report.quality.results[0].by_kind)
    # Four qualities against three prices, a map for each plan and the scale, scores, roofline.
    assert len(sizes) == 4 * 3 + len(report.plans) + 1 + kinds + 1
    for label, width, height, shapes in sizes:
        assert label
        assert width > 120, label
        assert height > 20, label
        assert shapes > 5, label


def test_it_fits_the_screen(page: Any) -> None:
    wide, screen = page.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= screen
    small = page.execute_script(
        """return [...document.querySelectorAll('svg text')].filter(text =>
            text.textContent.trim() && text.getBoundingClientRect().height < 7).length"""
    )
    assert small == 0


def contrast(page: Any, selector: str) -> float:
    """Return the contrast of an element's text with its section's ground (WCAG 2)."""
    colours = page.execute_script(
        """const element = document.querySelector(arguments[0]);
        const ground = element.closest('section') || document.body;
        return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]""",
        selector,
    )
    lights = []
    for colour in colours:
        parts = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(lights)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("selector", ["h1", "section p", ".note", "section summary", "td", "nav a"])
def test_text_can_be_read(page: Any, selector: str) -> None:
    assert contrast(page, selector) >= 4.5


def test_light_and_dark_follow_the_system_and_the_switch(page: Any) -> None:
    def light() -> float:
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return float(sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])))

    scheme = page.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
    assert (light() < 200) == scheme
    page.execute_script("document.querySelector('#theme-dark').click()")
    assert light() < 200
    page.execute_script("document.querySelector('#theme-light').click()")
    assert light() > 600


def test_all_of_it_is_reached_by_keyboard(page: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    reached: dict[int, str] = {}
    for _ in range(80):
        page.switch_to.active_element.send_keys(Keys.TAB)
        place, name = page.execute_script(
            """const one = document.activeElement;
            return [[...document.querySelectorAll('*')].indexOf(one), one.id ||
                one.getAttribute('href') || one.getAttribute('aria-label') ||
                one.textContent.trim()]"""
        )
        if place in reached:
            break
        reached[place] = name
    wanted = page.execute_script(
        """return [...document.querySelectorAll('nav a')].map(x => x.getAttribute('href'))
            .concat([...document.querySelectorAll('summary')].map(x => x.textContent.trim()))
            .concat([...document.querySelectorAll('.scroll, pre')]
                .filter(x => x.checkVisibility()).map(x => x.getAttribute('aria-label')))"""
    )
    assert len(wanted) > 10
    assert set(wanted) <= set(reached.values())
    assert "theme-auto" in reached.values()
    details = page.find_element(By.CSS_SELECTOR, "details")
    assert details.get_attribute("open") is None
    details.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
    assert details.get_attribute("open") is not None
    page.find_element(By.ID, "theme-auto").send_keys(Keys.ARROW_RIGHT)
    assert page.find_element(By.ID, "theme-light").is_selected()
