"""Progress and notes where no terminal shows bars."""

import logging

import pytest

from blasst.cli import console
from blasst.pages import Table


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_step_prints_its_beginning_its_end_and_a_line_now_and_then(
    clock, capsys
):
    with console.shown_progress() as progress:
        for second in range(25):
            clock[0] = 100.0 + second
            progress("Dense passes", second / 25, f"pass {second}")
        progress("Dense passes", 1.0, "")
        progress("Candidates", 0.0, "reverse")
    assert capsys.readouterr().out.splitlines() == [
        "Dense passes: 0% after 0 s pass 0",
        "Dense passes: 40% after 10 s pass 10",
        "Dense passes: 80% after 20 s pass 20",
        "Dense passes: 100% after 24 s",
        "Candidates: 0% after 0 s reverse",
    ]


def test_a_note_that_is_logged_again_is_shown_once(capsys):
    log = logging.getLogger("blasst")
    with console.log_to_console():
        for length in (1024, 1024, 2048):
            log.warning("%d keys are too many", length)
    log.warning("nobody hears this")
    assert capsys.readouterr().err.splitlines() == [
        "note: 1024 keys are too many",
        "note: 2048 keys are too many",
    ]


def test_what_a_text_or_model_says_is_shown_as_it_is(capsys):
    console.show(Table("Answers", ("text", "answer"), (("[/INST]", "[bold]no[/]"),)))
    shown = capsys.readouterr().out
    assert "[/INST]" in shown
    assert "[bold]no[/]" in shown
