"""The page in Chromium: nothing on the console, charts drawn, search, sort, before and after, narrow and wide, dark and
light. It fails, and says how to get one, where there is no Chromium."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxrlhf.report import live
from jaxrlhf.report.page import write_page
from tests.support import chromium
from tests.support.made_runs import make_run

pytestmark = pytest.mark.browser
SIZES = [(1280, "light", "one"), (1280, "dark", "two"), (390, "light", "two"), (390, "dark", "one")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = chromium.find()
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=found.file, env={**found.environment}, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of one run, and that of two whose kl_coef differ."""
    folder = tmp_path_factory.mktemp("pages")
    made = [str(make_run(folder / "first")), str(make_run(folder / "second", steps=6, kl_coef=0.3))]
    write_page(made[:1], str(folder / "one.html"))
    write_page(made, str(folder / "two.html"))
    return {name: folder / f"{name}.html" for name in ("one", "two")}


class Opened:
    """A page in a window; what its console said, and what it asked the network for."""

    def __init__(self, browser: Any, address: str, width: int = 1280, scheme: str = "light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.said, self.asked = self.context.new_page(), [], []
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda message: self.said.append(message.text) if message.type != "log" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        assert self.page.evaluate("reportIsDrawn()") > 0

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.mark.parametrize("width, scheme, name", SIZES, ids=str)
def test_it_is_drawn_and_readable(browser, pages, width, scheme, name):
    with Opened(browser, pages[name].as_uri(), width, scheme) as opened:
        page = opened.page
        assert page.title() == f"{'first' if name == 'one' else 'first, second'} · jaxrlhf report"
        drawn = page.evaluate(
            "[...document.querySelectorAll('details[open] .chart')].map(it => it.querySelectorAll('svg path').length)"
        )
        assert len(drawn) > 30 and min(drawn) > 3
        page.evaluate("document.querySelectorAll('details.part').forEach(it => { it.open = true; })")
        assert page.evaluate("reportIsDrawn()") == page.locator(".chart").count()
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        wide = page.evaluate("[...document.querySelectorAll('.chart svg')].map(it => it.getBoundingClientRect().width)")
        assert max(wide) <= width and min(wide) > 250
        contrast = page.evaluate(CONTRAST)
        assert min(contrast.values()) >= 4.5, contrast  # WCAG AA
        assert opened.said == [] and [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []


CONTRAST = """() => {
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (it) => {
    const colour = getComputedStyle(it).backgroundColor;
    return colour.endsWith(', 0)') ? back(it.parentElement) : colour;
  };
  const ratio = (place, property = 'color') => {
    const it = document.querySelector(place);
    const [a, b] = [light(getComputedStyle(it)[property]), light(back(it))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const places = { body: 'body', caption: 'figcaption p', cell: '#table td', head: '#glance th' };
  const found = Object.entries(places).map(([name, place]) => [name, ratio(place)]);
  return { ...Object.fromEntries(found), axis: ratio('.chart svg text', 'fill') };
}"""


def test_search_filters_and_heads_sort(browser, pages):
    with Opened(browser, pages["one"].as_uri()) as opened:
        page = opened.page
        assert opened.texts("#count") == ["32 of 32"]
        page.fill("#search", "GREAT film")
        assert opened.texts("#count") == ["7 of 32"]
        assert all("great" in text for text in opened.texts("#table td.response"))
        page.fill("#search", "")
        scores = lambda: [float(text) for text in opened.texts('#table td[data-name="score"]')]
        page.click('#table th[data-column="score"]')
        assert (
            scores() == sorted(scores(), reverse=True)
            and page.get_attribute('th[data-column="score"]', "aria-sort") == "descending"
        )
        page.click('#table th[data-column="score"]')
        assert scores() == sorted(scores()) and len(scores()) == 32
        page.fill("#search-config", "kl_coef")
        assert opened.texts("#config tbody tr") == ["algorithm.kl_coef\t0.1"]
        assert opened.said == []


def test_before_and_after_marks_what_changed(browser, pages):
    with Opened(browser, pages["two"].as_uri()) as opened:
        page = opened.page
        page.click("#show-pairs")
        assert page.locator("#pairs").is_visible() and not page.locator("#table").is_visible()
        page.select_option("#of-run", "first")
        page.fill("#search", "number 3")
        assert opened.texts("#pairs .before del") == ["plain"] and opened.texts("#pairs .after ins") == ["gorgeous"]
        page.click("#show-table")
        assert page.locator("#table").is_visible() and not page.locator("#pairs").is_visible()
        assert opened.said == []


def test_what_differs_between_configs(browser, pages):
    with Opened(browser, pages["two"].as_uri()) as opened:
        keys = [text.split("\t")[0] for text in opened.texts("#config tbody tr")]
        assert keys == ["run_dir", "algorithm.kl_coef"]
        opened.page.uncheck("#differences")
        assert opened.page.locator("#config tbody tr").count() == 6


def test_a_run_can_be_hidden(browser, pages):
    with Opened(browser, pages["two"].as_uri()) as opened:
        lines = (
            "document.querySelector('[data-chart=\"curve/score/mean\"]').querySelectorAll('svg .mark-line path').length"
        )
        assert opened.page.evaluate(lines) == 4
        opened.page.click("#series button >> text=second")
        opened.page.wait_for_function(f"{lines} === 2")
        assert opened.said == []


def test_alarms_are_listed_and_marked(browser, pages):
    with Opened(browser, pages["one"].as_uri()) as opened:
        found = json.loads(opened.page.text_content("#content"))
        assert found["alarms"] and len(opened.texts("#alarms li")) == len(found["alarms"])
        marked = {metric for alarm in found["alarms"] for metric in alarm["metrics"]}
        rules = "[...document.querySelectorAll('.chart')].filter(it => it.querySelector('.mark-rule.role-mark path, "
        rules += ".mark-rule.role-mark line')).map(it => it.dataset.chart.replace(/^(curve|share)\\//, ''))"
        assert set(opened.page.evaluate(rules)) - {"win_rates/win rates"} == marked and opened.said == []


def test_the_colours_can_be_chosen(browser, pages):
    with Opened(browser, pages["one"].as_uri(), scheme="light") as opened:
        back = "getComputedStyle(document.body).backgroundColor"
        light = opened.page.evaluate(back)
        for _ in range(2):
            opened.page.click("#theme")
        assert opened.texts("#theme") == ["dark"] and opened.page.evaluate(back) != light


def test_evaluations_are_drawn_and_listed(browser, pages):
    with Opened(browser, pages["two"].as_uri()) as opened:
        place = "document.querySelector(\"[data-chart='win_rates/win rates']\")"
        drawn = f"[...{place}.querySelectorAll('.mark-symbol.role-mark path')].length"
        labels = f"[...{place}.querySelectorAll('.role-axis-label text')].map(it => it.textContent)"
        assert opened.page.evaluate(drawn) == 5
        assert {"first, step 4, reward", "second, step 4, reward"} <= set(opened.page.evaluate(labels))
        heads = opened.texts('details[data-name="Evaluations"] table >> nth=0 >> th')
        assert heads[:5] == ["run", "step", "judge", "against", "win rate"]
        rows = opened.texts('details[data-name="Evaluations"] table >> nth=0 >> tbody tr')
        assert rows[2].split("\t")[:6] == ["first", "8", "llm: org/<b>judge</b>", "chosen", "55.0%", "48.0% to 70.0%"]
        assert len(rows) == 5 and opened.said == []
        opened.page.click("#series button >> text=second")
        opened.page.wait_for_function(f"{drawn} === 4")


def test_hostile_text_stays_text(browser, pages):
    with Opened(browser, pages["one"].as_uri()) as opened:
        assert opened.page.title() != "taken" and opened.page.locator("#table b").count() == 0
        assert any("</script><script>" in text for text in opened.texts("#table td.response"))


def test_it_follows_a_live_run(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "FRESH", 0.0)
    run = make_run(tmp_path / "run", steps=3, names=["score/mean", "kl/reference"])
    with live.make_server([str(run)], "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Opened(browser, f"http://127.0.0.1:{server.server_address[1]}/") as opened:
            assert "step 3 of 12" in opened.texts("#runs")[0]
            opened.page.fill("#search", "number")
            with open(run / "metrics.jsonl", "a") as file:
                file.write(
                    json.dumps({"step": 4, "score/mean": 2.5, "kl/reference": 3.0, "policy/entropy": 1.0}) + "\n"
                )
            opened.page.wait_for_function(
                "document.querySelector('#runs').innerText.includes('step 4 of 12')", timeout=30_000
            )
            opened.page.wait_for_function("document.querySelector('[data-chart=\"curve/policy/entropy\"] svg')")
            assert opened.page.input_value("#search") == "number" and opened.said == []
        server.shutdown()
