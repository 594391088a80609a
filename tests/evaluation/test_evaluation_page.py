"""The page of an evaluation as a browser shows it, and where the marks of its plots stand.

Chromium opens the page in frames of a phone's and of a desktop's width, and says what it sees.
"""

import functools
import json
import math
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lit_llm.evaluation.evaluation_page import Cell, Prose, Section, Table, html_page
from lit_llm.evaluation.evaluation_plots import panels_of, side_by_side
from lit_llm.evaluation.evaluation_report import write_report
from lit_llm.evaluation.results import (
    Answer,
    Items,
    Measurement,
    ModelResults,
    TaskResult,
    measure,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NAMES = ["base", "an/extremely-long-name-of-a-model-" + "x" * 60, "ppo </td><b>final</b>"]
HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src='/stolen.png' onerror='x()'>"
    "</div></details></table><b id='bold'>bold</b><iframe src='/frame.html'></iframe>"
    "<style>body{display:none}</style> {{ 7 * 7 }} & \"quoted\" 'too' \u202egnp.exe \x00 \ud800 | x"
)
SHOWN = (
    HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x00", "⟨U+0000⟩").replace("\ud800", "\ufffd")
)
LONG = "word " * 300 + "y" * 400

# Two frames of the page, of the same origin, so that the outer page may look into them.
FRAMES = """<!doctype html><html><body><pre id=facts></pre>
<iframe src="evaluation.html" style="width:420px;height:900px;border:0"></iframe>
<iframe src="evaluation.html" style="width:1200px;height:900px;border:0"></iframe>
<script>
window.onload = () => {
  const facts = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, all = query => [...page.querySelectorAll(query)];
    const texts = query => all(query).map(one => one.textContent);
    for (const one of all('details')) one.open = true;
    const box = one => one.getBoundingClientRect();
    return {
      title: page.title, width: frame.contentWindow.innerWidth,
      scrolled: page.documentElement.scrollWidth,
      outside: all('main *').filter(one => box(one).width > 0 && !one.closest('svg')
        && box(one).right > frame.contentWindow.innerWidth + 1).map(one => one.outerHTML),
      headings: texts('h2'), parts: texts('details.fold > summary'),
      rows: all('table').map(one => one.tBodies[0].rows.length),
      columns: all('table').map(one => new Set([...one.rows].map(row => row.cells.length)).size),
      replies: texts('.reply > .text, .reply details .text'), names: texts('.reply h5'),
      cut: texts('.reply > .cut'), more: texts('.reply details summary'),
      about: texts('.about'),
      forbidden: all('script, img, iframe, object, #bold, [onerror]').length,
      changes: texts('.change.worse'),
      marks: all('.track svg').map(one => one.getAttribute('x')), legend: texts('.legend .m0'),
      colour: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      ink: frame.contentWindow.getComputedStyle(page.body).color,
      spoken: all('.track[role=img]').map(one => one.getAttribute('aria-label')),
    };
  });
  document.getElementById('facts').textContent = JSON.stringify(facts);
};
</script></body></html>
"""


def shares(task, right, count=40, **changes):
    parts = ["law" if n % 2 else "art" for n in range(count)]
    values = [float(n < right) for n in range(count)]
    items = Items([str(n) for n in range(count)], values, [1.0] * count, parts)
    return measure(task, "acc", items, chance=0.25, **changes)


def models():
    found = []
    for place, name in enumerate(NAMES):
        tasks = []
        for number in range(30):
            task = f"task_{number}" + "_of_a_long_name" * (6 if number == 7 else 0)
            category = ("reasoning", "facts", "safety")[number // 10]
            texts = [("42", 1.0), (HOSTILE, 0.0), (LONG, 0.0), ("", 0.0)]
            answers = []
            for item in range(2 if number == 0 else 0):
                text, right = texts[(item + place) % 4]
                answers.append(Answer(task, f"q{item}", HOSTILE, text, HOSTILE, {"acc": right}))
            right = 20 if number else (30, 5, 25)[place]
            tasks.append(TaskResult(task, category, [shares(task, right)], answers))
        skipped = f"no file {HOSTILE}"
        tasks.append(TaskResult("bbh", "reasoning", skipped=skipped))
        found.append(ModelResults(name, "/runs", tasks, {"context": 2048}))
    return found


class Quiet(SimpleHTTPRequestHandler):
    """A server of one folder that writes down what it is asked for."""

    def __init__(self, *args, asked, **settings):
        self.asked = asked
        super().__init__(*args, **settings)

    def log_message(self, form, *args):
        self.asked.append(self.path)


def opened(folder, profile, page, *flags):
    """What Chromium gives for a page of the folder, and what it asked the server for."""
    asked = []
    handler = functools.partial(Quiet, directory=str(folder), asked=asked)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            done = subprocess.run(
                [
                    BROWSER,
                    *"--headless --no-sandbox --disable-gpu --no-first-run".split(),
                    *"--disable-background-networking --disable-dev-shm-usage".split(),
                    f"--user-data-dir={profile}",
                    *flags,
                    f"http://127.0.0.1:{server.server_port}/{page}",
                ],
                capture_output=True,
                timeout=100,
                check=True,
            )
        finally:
            server.shutdown()
    return done.stdout.decode("utf-8"), asked


@pytest.fixture(scope="module")
def browsed(tmp_path_factory):
    """What Chromium sees at a phone's and at a desktop's width, in the dark."""
    if BROWSER is None:
        pytest.skip("no browser: apt-get install chromium, or put google-chrome on the PATH")
    folder = tmp_path_factory.mktemp("page")
    write_report(folder, models(), command=f"evaluate {HOSTILE}", title="Evaluation & more")
    (folder / "frames.html").write_text(FRAMES, encoding="utf-8")
    flags = ("--blink-settings=preferredColorScheme=0", "--virtual-time-budget=5000", "--dump-dom")
    profile = tmp_path_factory.mktemp("profile")
    tree, asked = opened(folder, profile, "frames.html", *flags)
    text = re.search(r'<pre id="facts">(.*?)</pre>', tree, re.DOTALL).group(1)
    for name, sign in (("lt", "<"), ("gt", ">"), ("amp", "&")):
        text = text.replace(f"&{name};", sign)
    phone, desktop = json.loads(text)
    return {"phone": phone, "desktop": desktop, "asked": asked}


def test_the_page_asks_for_nothing_else(browsed):
    assert set(browsed["asked"]) - {"/favicon.ico"} == {"/frames.html", "/evaluation.html"}


@pytest.mark.parametrize("width", ["phone", "desktop"])
def test_a_browser_shows_the_page(browsed, width):
    seen = browsed[width]
    assert seen["title"] == "Evaluation & more"
    assert seen["headings"] == [
        "What can be said",
        "Summary",
        "Reasoning",
        "Facts",
        "Safety",
        "Length of answers",
        "Samples",
        "How it was run",
        "How to read this",
    ]
    # The summary, three categories with the parts of ten tasks each, lengths, models, settings.
    assert seen["rows"] == [30, *([10] + [2] * 10) * 3, 1, 3, 30]
    assert set(seen["columns"]) == {1}, "all rows of a table have as many cells"
    # Of 30 right answers 25 were lost; 5 by the third model are not certain.
    assert seen["changes"] == ["▼ worse -0.625"] * 2
    assert [one.strip() for one in seen["legend"]] == ["base"] * 3


@pytest.mark.parametrize("width", ["phone", "desktop"])
def test_hostile_text_is_text(browsed, width):
    seen = browsed[width]
    assert seen["forbidden"] == 0
    assert seen["names"] == NAMES * 2
    # Items 0 and 1 of three models: "42", hostile, long; hostile, long, empty.
    assert [seen["replies"].count(text) for text in ("42", SHOWN, LONG, "")] == [1, 2, 2, 1]
    assert seen["cut"] == [f"{LONG[:500]} …"] * 2
    assert seen["more"] == [f"all {len(LONG):,} characters"] * 2
    assert "acc 0.000, empty" in seen["about"]


@pytest.mark.parametrize(("width", "pixels"), [("phone", 420), ("desktop", 1200)])
def test_nothing_is_wider_than_the_window(browsed, width, pixels):
    seen = browsed[width]
    assert seen["width"] == pixels
    assert seen["scrolled"] <= pixels
    assert seen["outside"] == []


def test_marks_stand_where_the_numbers_are(browsed):
    # Task 0 of three models, with 40 items on an axis from 0 to 1.
    assert browsed["desktop"]["marks"][:3] == ["75.0%", "12.5%", "62.5%"]
    assert len(browsed["desktop"]["marks"]) == 30 * 3
    assert browsed["desktop"]["spoken"][0].startswith("task_0 acc: base 0.750 (0.598 to 0.858); ")


def test_the_dark_page_is_dark(browsed):
    paper, ink = (
        sum(map(int, re.findall(r"\d+", browsed["phone"][name])[:3])) for name in ("colour", "ink")
    )
    assert paper < 100 and ink > 600


@pytest.mark.thorough
@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
def test_the_light_page_can_be_drawn(tmp_path):
    import matplotlib.image

    write_report(tmp_path, models(), command="evaluate")
    shot = tmp_path / "shot.png"
    flags = ("--blink-settings=preferredColorScheme=1", "--window-size=1200,3000")
    opened(tmp_path, tmp_path / "profile", "evaluation.html", *flags, f"--screenshot={shot}")
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    assert (pixels == 1).all(-1).mean() > 0.5, "white paper"
    assert len(set(map(tuple, (pixels[::3, ::3].reshape(-1, 3) * 255).astype(int)))) > 50


class Reader(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_every_part_of_the_page_is_escaped():
    cell = Cell(HOSTILE, HOSTILE, "worse", HOSTILE)
    blocks = [Prose([HOSTILE]), Table([HOSTILE, HOSTILE], [[cell, cell]])]
    found = read(html_page(HOSTILE, [Section(HOSTILE, blocks)]))
    plain = read(
        html_page(
            "", [Section("", [Prose([""]), Table(["", ""], [[Cell("", "a", "worse", "")] * 2])])]
        )
    )
    assert found.tags == plain.tags
    assert [text for text in found.texts if text == SHOWN]
    assert ("data-label", SHOWN) in found.attributes


def test_the_page_needs_nothing_else():
    found = read(html_page("t", [Section("s", [Prose(["https://example.org"])])]))
    assert "script" not in found.tags
    assert [value for name, value in found.attributes if name in ("src", "href")] == [
        "data:,",
        "#part1",
    ]
    assert any("default-src 'none'" in (value or "") for _, value in found.attributes)


def lines_of(*measured, category="facts"):
    """Lines of one model for each tuple of measurements."""
    return side_by_side(
        [
            ModelResults(str(n), "", [TaskResult(one.task, category, [one]) for one in own])
            for n, own in enumerate(measured)
        ]
    )


def test_shares_stand_on_an_axis_from_0_to_1():
    lines = lines_of([shares("a", 10), shares("b", 20)], [shares("a", 30)])
    (panel,) = panels_of(lines)
    assert [row.label for row in panel.rows] == ["a acc", "b acc"]
    assert [(mark.model, mark.at) for mark in panel.rows[0].marks] == [(0, 25.0), (1, 75.0)]
    assert panel.rows[0].chance == 25.0
    assert panel.ticks == [(0, "0"), (20, "0.2"), (40, "0.4"), (60, "0.6"), (80, "0.8"), (100, "1")]
    low, high = panel.rows[1].marks[0].low, panel.rows[1].marks[0].high
    assert (low, high) == pytest.approx((35.2, 64.8), abs=0.05)


def test_other_numbers_have_an_axis_of_their_own():
    gap = Measurement("w", "gap", -0.1, -0.2, 0.1, 9, "ideal", 0.0)
    words = Measurement("w", "words", 30.0, 20.0, 40.0, 9, None)
    lost = Measurement("w", "lost", math.nan, math.nan, math.nan, 9)
    plain = Measurement("w", "score", 5.0, math.nan, math.nan, 9)
    panels = panels_of(lines_of([gap, words, lost, plain, shares("w", 3)]))
    assert [panel.title for panel in panels] == [
        "gap (nearer to 0 is better)",
        "score (higher is better)",
        "shares, higher is better",
    ]
    (row,) = panels[0].rows
    # The axis reaches 6 % of the span of 0.3 beyond both ends.
    places = [100 * (at + 0.218) / 0.336 for at in (-0.1, -0.2, 0.1, 0.0)]
    found = [row.marks[0].at, row.marks[0].low, row.marks[0].high, row.chance]
    assert found == pytest.approx(places, abs=0.01)
    assert [label for _, label in panels[0].ticks] == ["-0.2", "-0.1", "0", "0.1"]
    assert panels[1].rows[0].marks[0].at == 50 and panels[1].rows[0].marks[0].low is None


def test_numbers_far_apart_stand_on_a_logarithmic_axis():
    own = [
        Measurement(f"t{n}", "perplexity", at, at, at, 9, "lower")
        for n, at in enumerate((10, 1000))
    ]
    (panel,) = panels_of(lines_of(own, category="perplexity"))
    assert panel.title == "perplexity (lower is better), logarithmic axis"
    assert [row.label for row in panel.rows] == ["t0", "t1"]
    first, last = (row.marks[0].at for row in panel.rows)
    # From 10 / 1.2 to 1000 · 1.2: both marks are as far from their end.
    assert first == pytest.approx(100 * math.log(1.2) / math.log(144), abs=0.01)
    assert first + last == pytest.approx(100)
    ticks = {label: at for at, label in panel.ticks}
    assert ticks["10"] == first and ticks["1000"] == last and ticks["100"] == pytest.approx(50)


@pytest.mark.parametrize("top", [0.013, 1.7, 36.0, 4.2e5, 1e300])
def test_every_axis_has_a_few_ticks_within_it(top):
    own = [Measurement(f"t{n}", "m", at, at, at, 9, "lower") for n, at in enumerate((top / 9, top))]
    far = [Measurement(f"t{n}", "m", at, at, at, 9, "lower") for n, at in enumerate((1e-3, top))]
    for values in (own, far):
        (panel,) = panels_of(lines_of(values, category="perplexity"))
        assert 1 <= len(panel.ticks) <= 7
        assert all(0 <= at <= 100 for at, _ in panel.ticks)
        assert len({label for _, label in panel.ticks}) == len(panel.ticks)
