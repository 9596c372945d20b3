"""The explorer's page in a real browser: Debian's chromium, driven by selenium."""

import json
import shutil
import threading

import pytest

from rope_mm.analysis.explorer import EXAMPLES, serve

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
INSIDE = EXAMPLES["text inside a long video"]


@pytest.fixture(scope="module")
def address():
    server = serve(port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in [*FLAGS.split(), "--window-size=1400,1400", f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser, condition):
    """Wait until the JavaScript expression is true, and give its value."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(f"return {condition}"))


def text_of(browser, part, scheme):
    return browser.execute_script(
        "return document.querySelector(`[data-scheme='${arguments[1]}'] [data-part=${arguments[0]}]`)"
        ".textContent",
        part,
        scheme,
    )


def choose(browser, control, value, event="change"):
    browser.execute_script(
        "const node = document.getElementById(arguments[0]); node.value = arguments[1];"
        "node.dispatchEvent(new Event(arguments[2]))",
        control,
        value,
        event,
    )


def open_page(browser, address, query=""):
    browser.get(address + query)
    wait(browser, "document.querySelectorAll('[data-scheme]').length > 0")


def console(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def requests_of(browser, address):
    """Addresses that the page has asked for; chromium's own start page is left out."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["request"]["url"] for event in sent if event["documentURL"].startswith(address)]


def test_the_page_loads_without_console_errors_and_asks_nothing_of_other_hosts(browser, address):
    open_page(browser, address)
    assert browser.execute_script("return document.querySelectorAll('circle[data-token]').length") > 30
    assert console(browser) == []
    asked = requests_of(browser, address)
    assert any(url.startswith(f"{address}view?") for url in asked)
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


def test_text_inside_a_long_video_is_named_under_m_rope_hf_and_not_under_m_rope(browser, address):
    open_page(browser, address, f"?scheme=m-rope-hf&compare=m-rope&segments={INSIDE.replace(' ', '+')}")
    wait(browser, "document.querySelectorAll('[data-scheme]').length === 2")
    assert "tokens of text:12 (segment 2) stand no later in time" in text_of(browser, "overlaps", "m-rope-hf")
    assert "Every segment stands after all of the earlier ones" in text_of(browser, "overlaps", "m-rope")


@pytest.mark.parametrize(
    ("control", "value", "event", "shown"),
    [
        ("scheme", "videorope", "change", "scheme='videorope'"),
        ("segments", "text:2 image:2x2", "input", "'text:2 image:2x2'"),
        ("example", INSIDE, "change", repr(INSIDE)),
        ("theta", "3", "input", "theta=1000.0"),
        ("head_dim", "128", "input", "head_dim=128"),
        ("extension", "linear", "change", "'rope_type': 'linear'"),
        ("factor", "4", "input", "'factor': 4.0"),
    ],
)
def test_every_control_changes_the_python_that_is_shown_and_the_address(
    browser, address, control, value, event, shown
):
    open_page(browser, address, "?extension=yarn" if control == "factor" else "")
    choose(browser, control, value, event)
    wait(browser, f"document.querySelector('pre').textContent.includes({shown!r})")
    assert wait(browser, f"location.search.includes('{control if control != 'example' else 'segments'}=')")
    assert console(browser) == []


def test_theta_is_no_control_of_a_scheme_that_it_has_no_effect_on(browser, address):
    open_page(browser, address, "?theta=500&compare=pixel-log")
    wait(browser, "document.querySelectorAll('[data-scheme]').length === 2")
    assert "theta=500.0" in browser.execute_script("return document.querySelector('pre').textContent")
    choose(browser, "scheme", "pixel-log")
    wait(browser, "document.getElementById('theta').disabled")
    assert "set freq_range" in browser.execute_script("return document.getElementById('theta').title")
    choose(browser, "extension", "yarn")
    wait(browser, "!document.getElementById('theta').disabled")
    assert browser.execute_script("return document.getElementById('error').textContent") == ""
    assert console(browser) == []


def test_an_option_of_the_layout_is_a_control_of_its_own(browser, address):
    open_page(browser, address, "?scheme=videorope")
    wait(browser, "document.getElementById('opt.step') !== null")
    choose(browser, "opt.step", "1.5", "input")
    wait(browser, "document.querySelector('pre').textContent.includes(\"('step', 1.5)\")")


def test_a_click_on_a_token_shows_its_score_with_every_other_one(browser, address):
    open_page(browser, address)
    browser.execute_script(
        "document.querySelector('circle[data-token=\"7\"]').dispatchEvent(new MouseEvent('click'))"
    )
    wait(browser, "document.body.textContent.includes('Score of token 7 with every token')")


def test_bad_segments_show_a_sentence_and_the_page_stays(browser, address):
    open_page(browser, address)
    choose(browser, "segments", "text:1000000000", "input")
    wait(browser, "document.getElementById('error').textContent.includes('1000000000 tokens')")
    assert browser.execute_script("return document.querySelectorAll('[data-scheme]').length") == 1
    choose(browser, "segments", "text:5", "input")
    wait(browser, "document.getElementById('error').textContent === ''")


def test_every_control_has_a_label_for_screen_readers(browser, address):
    open_page(browser, address)
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('input, select, textarea')]"
        ".filter(node => !node.getAttribute('aria-label') && !node.closest('label')).map(node => node.id)"
    )
    assert unnamed == []
