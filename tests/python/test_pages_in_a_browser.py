"""Reports in a headless browser: no error in its console, nothing cut off on a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest
from lxml.html import fromstring

from blasst.evaluation import Options, evaluate, report
from test_evaluation import LENGTH, TEXTS, configured

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
WIDTH = 400

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)

# The report stands in a frame as wide as a phone, for browsers have no window that is narrower than
# 500 pixels. What the reader does, and what is seen then, is written down as JSON.
FRAME = """<!doctype html>
<iframe width="WIDTH" height="800" style="border: 0" srcdoc="REPORT"></iframe>
<pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, found = { said: [], pictures: [], colours: [] };
  const tiles = page.querySelector(".tiles"), tokens = page.querySelector(".tokens");
  const move = (slider, value) => {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
  };
  const spans = () => [...tokens.querySelectorAll(".text span")];
  for (const value of [0, 1]) {
    move(tiles.querySelector(".setting"), value);
    found.said.push(tiles.querySelector("output").textContent);
    found.pictures.push([...tiles.querySelectorAll("canvas")].map((c) => c.toDataURL()));
    move(tokens.querySelector(".setting"), value);
    found.colours.push(spans().filter((span) => span.style.backgroundColor).length);
  }
  [found.thresholds, found.levels] = [[], []];
  const groups = tiles.querySelector("select");
  groups.selectedIndex = 1;
  groups.dispatchEvent(new Event("change"));
  for (const value of [0, tiles.querySelector(".setting").max]) {
    move(tiles.querySelector(".setting"), value);
    found.thresholds.push(tiles.querySelector("output").textContent);
    found.levels.push([...tiles.querySelectorAll("canvas")].map((c) => c.toDataURL()));
  }
  tiles.querySelector(".map").click();
  found.layer = tiles.querySelectorAll("output")[1].textContent;
  const select = tokens.querySelector("select");
  select.selectedIndex = 1;
  select.dispatchEvent(new Event("change"));
  found.text = spans().map((span) => span.textContent).join("");
  spans().at(-1).click();
  found.told = tokens.querySelectorAll("output")[1].textContent;
  page.querySelectorAll("details").forEach((one) => one.open = true);
  found.width = page.documentElement.scrollWidth;
  const scrolled = (e) => e.closest(".wide, .text, svg") && !e.matches(".wide, .text, svg");
  found.wider = [...page.body.querySelectorAll("*")]
    .filter((e) => !scrolled(e) && e.getBoundingClientRect().right > WIDTH)
    .map((e) => e.outerHTML.slice(0, 80));
  found.opened = [...page.querySelectorAll("table")].every((t) => t.clientHeight > 0);
  document.querySelector("#found").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.fixture(scope="module", autouse=True)
def _browser_shows_pages(tmp_path_factory):
    """Some that are installed show none: confined to a home folder, or without their libraries."""
    path = tmp_path_factory.mktemp("blank") / "blank.html"
    path.write_text("<p>to be shown</p>")
    if "to be shown" not in shown(path)[0]:
        pytest.skip(f"{BROWSER} shows no pages of {path.parent}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    options = Options(
        targets=(0, 0.5, 0.9),
        length=LENGTH,
        texts=TEXTS,
        every=2,
        needles=2,
        needle_lengths=(LENGTH // 2, LENGTH),
        timed_lengths=(LENGTH // 2, LENGTH),
        repeats=2,
    )
    results = evaluate(configured(), options, out=out)
    return report.write("A title", "About", results, None, out)


def shown(path) -> tuple[str, list[str]]:
    """The page once its scripts have run, and the lines of the browser's console."""
    run = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            "--disable-dev-shm-usage",  # containers have little of it
            "--enable-logging=stderr",
            *(f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=10000"),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return run.stdout, re.findall(r"CONSOLE.*", run.stderr)


@pytest.fixture(scope="module")
def found(page):
    framed = page.with_name("framed.html")
    quoted = html.escape(page.read_text())
    framed.write_text(FRAME.replace("WIDTH", str(WIDTH)).replace("REPORT", quoted))
    dumped, console = shown(framed)
    assert not console
    [pre] = fromstring(dumped).xpath("//pre[@id='found']")
    return json.loads(pre.text)


def test_the_console_has_no_error(page, tmp_path):
    assert shown(page)[1] == []
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("JSON.parse", "JSON.pars"))
    assert "JSON.pars is not a function" in shown(broken)[1][0], "the browser does tell"


def test_nothing_is_cut_off_at_the_width_of_a_phone(found):
    assert found["width"] == WIDTH
    assert found["wider"] == []
    assert found["opened"]


def test_the_slider_goes_over_thresholds(found):
    low, high = found["said"]
    assert low.startswith("calibrated, 50%: threshold ")
    assert high.startswith("calibrated, 90%: threshold ")
    assert len(found["pictures"][0]) == 1 + 4, "layers and heads, and the heads of one layer"
    assert all(a != b for a, b in zip(*found["pictures"], strict=True))
    assert found["layer"].startswith("layer 0: ")


def test_another_goes_over_thresholds_that_nobody_calibrated(found):
    assert found["thresholds"] == ["threshold 2.2e-05", "threshold 1"]
    assert all(a != b for a, b in zip(*found["levels"], strict=True))


def test_tokens_are_coloured_by_what_skipping_cost_them(found):
    assert 0 < found["colours"][0] <= found["colours"][1]
    assert TEXTS["second"].startswith(found["text"].lstrip())
    assert len(found["text"]) > LENGTH // 2
    assert re.search(r"nats|not compared", found["told"])
