"""Reports as pages: the verdict first, details folded, nothing wider than a phone."""

import itertools
import re

import pytest
from lxml import html

from blasst.evaluation import report
from blasst.evaluation.report.plots import plots_of
from blasst.evaluation.report.verdict import verdict
from blasst.evaluation.settings import Scheme
from blasst.measure.results import Results
from blasst.pages.page import drawn


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
        }
        found.put(value, "text", "prose", scheme, target)
        for length in (500, 1000):
            seconds = [length / 500 * (1 + share - sparsity / 2) for share in (0.2, 0, 0.1)]
            time = {"seconds": seconds, "sparsity": sparsity, "attention": 0.5 - sparsity / 2}
            found.put(time, "time", length, scheme, target)
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
            "tokens the same, prefill of 1000 tokens in 0.77 of dense's time. "
            "1 of 2 settings costs more than 1%.",
        ),
        (
            (DENSE, MOST),
            "No target keeps perplexity within 1% of dense. Nearest: 90.0% of prefill's tiles "
            "skipped (calibrated, 90%): perplexity +25.00%, 91.0% of next tokens the same, "
            "prefill of 1000 tokens in 0.59 of dense's time.",
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
    elements = [e for e in page.iter() if e.tag in ("h1", "p", "figure", "details")]
    first, second, third, *rest = elements
    assert (first.tag, second.get("class"), third.text) == ("h1", "verdict", "About <it>")
    kinds = [e.tag for e in rest if e.getparent().tag != "details"]
    assert kinds == sorted(kinds, key=["figure", "details"].index)
    assert {"figure", "details"} <= set(kinds)
    for table in page.iter("table"):
        [details] = table.iterancestors("details")
        assert details.get("open") is None
        assert details.find("summary").text_content().strip()


def test_nothing_is_wider_than_a_phone_or_fetched_from_elsewhere(page):
    [viewport] = page.xpath("//meta[@name='viewport']")
    assert viewport.get("content").startswith("width=device-width")
    for table in page.iter("table"):
        assert table.getparent().get("class") == "wide"
    style = page.find(".//style")
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", style.text)
    assert re.search(r"svg \{ width: 100%", style.text)
    assert not page.xpath("//link | //script[@src] | //img")


def test_colours_are_the_readers_dark_or_light(page):
    style = page.find(".//style")
    assert "color-scheme: light dark" in style.text
    assert re.search(r"background: Canvas; color: CanvasText", style.text)
    fixed = [c for c in re.findall(r"#[0-9a-f]+\b", style.text) if len(c) not in (5, 9)]
    assert not fixed, "opaque colours, which only one of the two can be read on"
    for picture in page.iter("svg"):
        drawn = html.tostring(picture, encoding="unicode")
        assert "currentColor" in drawn
        assert "#000000" not in drawn


def test_times_have_their_spread_attentions_share_and_the_gain_that_it_predicts(tmp_path):
    found = results_of(tmp_path, DENSE, HALF)
    [table] = [t for t in report.tables(found, None) if t.title == "Prefill by length"]
    rows = {row[:2]: row[2:] for row in table.rows}
    assert rows["1000", "dense"] == (
        *("0.0%", "2.200 s", "2.000 to 2.400 s", "0.500 s", "23%", "", ""),
    )
    assert rows["1000", "calibrated, 50%"] == (
        *("50.0%", "1.700 s", "1.500 to 1.900 s", "0.250 s", "15%", "1.29x", "1.13x"),
    )


def test_facts_are_told_by_depth_and_length(tmp_path):
    found = Results(tmp_path / "results.jsonl", "")
    for length, depth, right in ((500, 0.25, True), (1000, 0.25, False), (1000, 0.75, True)):
        value = {"right": right, "question": "?", "expected": ["yes"], "answer": ""}
        value |= {"sparsity": 0.0, "decode_sparsity": 0.0}
        found.put(value, "needle", length, depth, Scheme.DENSE, 0.0)
    [table] = [t for t in report.tables(found, None) if t.title == "Facts by depth and length"]
    assert table.columns[2:] == ("500 tokens", "1000 tokens")
    assert [row[1:] for row in table.rows] == [("25%", "found", "not found"), ("75%", "", "found")]


FOUND = {"right": True, "question": "?", "expected": ["yes"], "answer": "yes"}


def results_at(folder, targets, lengths) -> Results:
    """Of two layers of three heads, at these targets and lengths."""
    found = results_of(folder)
    for target in targets:
        key = Scheme.CALIBRATED if target else Scheme.DENSE, target
        value = {"kl": 0.0, "top1": 1 - target / 1000, "dense_perplexity": 10.0}
        value |= {"perplexity": 10 + target / 100, "sparsity": target, "decode_sparsity": target}
        found.put(value | {"by_head": [[target] * 3] * 2}, "text", "prose", *key)
        for length in lengths:
            seconds = [length / 500 * (1 + share - target / 2) for share in (0, 0.01, 0.02)]
            timed = {"seconds": seconds, "sparsity": target, "attention": 0.5 - target / 4}
            found.put(timed, "time", length, *key)
            found.put(target, "length", length, 0, *key)
            for depth in (0.25, 0.75):
                found.put(value | FOUND, "needle", length, depth, *key)
    return found


def faults_of(axis) -> list[str]:
    """What is wrong with the labels that are seen along an axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    seen = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    seen = [label for label in seen if label.get_visible() and label.get_text()]
    texts, boxes = [label.get_text() for label in seen], [t.get_window_extent() for t in seen]
    faults = [] if len(set(texts)) == len(texts) else [f"alike: {texts}"]
    if any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)):
        faults.append(f"on top of each other: {texts}")
    if len(texts) < min(2, len(axis.get_majorticklocs())):
        faults.append(f"too few: {texts}")
    if corner := axis.get_offset_text().get_text():
        faults.append(f"not what they say, but {corner} more")
    return faults


@pytest.mark.parametrize(
    ("targets", "lengths"),
    [
        ((0, 0.25, 0.5, 0.65, 0.75, 0.85), (1024, 2048, 4096)),
        ((0.5, 0.503, 0.505), (1000, 1024, 1100)),
        ((0.99, 0.995, 0.9975), (4096,)),
        ((0, 0.001), (2100, 2900)),
        ((0, 0.5), (2000, 2048, 2100, 131072)),
        ((0, 0.5), [1024 << i for i in range(8)]),
    ],
)
def test_labels_along_an_axis_can_be_told_apart(targets, lengths, tmp_path):
    plots = plots_of(results_at(tmp_path, targets, lengths), None)
    assert len(plots) >= 7
    faults = []
    for name, _, draw in plots:
        with drawn(draw) as figure:
            figure.canvas.draw()
            axes, *_ = figure.axes  # what a bar of colours says does not depend on the numbers
            for axis in (axes.xaxis, axes.yaxis):
                faults += [f"{name}: {fault}" for fault in faults_of(axis)]
    assert not faults


def test_the_predicted_time_is_a_line_from_dense_also_of_one_target(tmp_path):
    plots = {name: draw for name, _, draw in plots_of(results_of(tmp_path, DENSE, HALF), None)}
    with drawn(plots["time"]) as figure:
        [line] = [one for one in figure.axes[0].lines if one.get_label() == "predicted"]
    assert [*zip(*line.get_data(), strict=True)] == [(0, 2.2), (0.5, pytest.approx(1.95))]


def test_targets_that_are_near_to_each_other_have_names_of_their_own(tmp_path):
    found = results_at(tmp_path, (0, 0.995, 0.9975), (1024,))
    names = {row[0] for table in report.tables(found, None) for row in table.rows}
    columns = {column for table in report.tables(found, None) for column in table.columns}
    assert {"calibrated, 99.5%", "calibrated, 99.75%"} <= names & columns
