"""Reports as pages: the verdict first, details folded, nothing wider than a phone."""

import re

import pytest
from lxml import html

from blasst.evaluation import report
from blasst.evaluation.report.verdict import verdict
from blasst.evaluation.settings import Scheme
from blasst.measure.results import Results


def results_of(folder, *settings) -> Results:
    """Of one text; settings are scheme, target, sparsity, perplexity over dense."""
    found = Results(folder / "results.jsonl", "")
    for scheme, target, sparsity, ratio in settings:
        value = {
            "kl": 0.01,
            "top1": 1 - sparsity / 10,
            "perplexity": 10 * ratio,
            "dense_perplexity": 10.0,
            "by_head": [[sparsity, sparsity]],
            "sparsity": sparsity,
            "prefill_seconds": 2.0 - sparsity,
        }
        found.put(value, "text", "prose", scheme, target)
    return found


DENSE = (Scheme.DENSE, 0.0, 0.0, 1.0)
HALF = (Scheme.CALIBRATED, 0.5, 0.5, 1.002)
MOST = (Scheme.CALIBRATED, 0.9, 0.9, 1.25)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            (DENSE, HALF, MOST),
            "50.0% of prefill's tiles skipped (calibrated, 50%): perplexity +0.20%, 95.0% of next "
            "tokens the same, prefill in 0.75 of dense's time. 1 of 2 settings costs more than 1%.",
        ),
        (
            (DENSE, MOST),
            "No target keeps perplexity within 1% of dense. Nearest: 90.0% of prefill's tiles "
            "skipped (calibrated, 90%): perplexity +25.00%, 91.0% of next tokens the same, "
            "prefill in 0.55 of dense's time.",
        ),
        (
            (DENSE, (Scheme.INT8, 0.0, 0.0, 1.0)),
            "No text was read sparsely: what skipping costs was not measured.",
        ),
        ((), "No text was read sparsely: what skipping costs was not measured."),
    ],
)
def test_the_verdict_is_the_most_that_is_skipped_at_little_cost(settings, said, tmp_path):
    assert verdict(results_of(tmp_path, *settings)) == said


def test_the_papers_scheme_is_no_verdict_on_the_calibrated_thresholds(tmp_path):
    paper = (Scheme.PAPER, 0.9, 0.95, 1.0)
    assert "50.0% of prefill's tiles" in verdict(results_of(tmp_path, DENSE, HALF, paper))


@pytest.fixture
def page(tmp_path):
    found = results_of(tmp_path, DENSE, HALF, MOST)
    path = report.write("Title", "About <it>", found, None, tmp_path)
    return html.fromstring(path.read_text())


def test_the_verdict_comes_first_then_pictures_then_folded_tables(page):
    elements = [e for e in page.iter() if e.tag in ("h1", "p", "img", "details")]
    first, second, third, *rest = elements
    assert (first.tag, second.get("class"), third.text) == ("h1", "verdict", "About <it>")
    kinds = [e.tag for e in rest if e.getparent().tag != "details"]
    assert kinds == sorted(kinds, key=["img", "details"].index)
    assert {"img", "details"} <= set(kinds)
    for table in page.iter("table"):
        [details] = table.iterancestors("details")
        assert details.get("open") is None
        assert details.find("summary").text_content().strip()


def test_nothing_is_wider_than_a_phone_or_fetched_from_elsewhere(page):
    [viewport] = page.xpath("//meta[@name='viewport']")
    assert viewport.get("content").startswith("width=device-width")
    for table in page.iter("table"):
        assert table.getparent().get("class") == "wide"
    [style] = page.iter("style")
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", style.text)
    assert re.search(r"img \{[^}]*max-width: 100%", style.text)
    assert not page.xpath("//link | //script[@src] | //img[not(starts-with(@src, 'data:'))]")


def test_colours_are_the_readers_dark_or_light(page):
    [style] = page.iter("style")
    assert "color-scheme: light dark" in style.text
    assert re.search(r"background: Canvas; color: CanvasText", style.text)
    fixed = [c for c in re.findall(r"#[0-9a-f]+\b", style.text) if len(c) not in (5, 9)]
    assert not fixed, "opaque colours, which only one of the two can be read on"
