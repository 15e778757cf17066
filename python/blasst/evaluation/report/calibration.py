"""What a calibration tried and reached, as tables."""

from blasst.calibration import Calibration
from blasst.pages import Table
from blasst.percent import percent


def calibration_tables(calibration: Calibration) -> list[Table]:
    """What was tried, and what it reaches at other lengths."""
    found = [_candidate_table(calibration), _held_out_table(calibration)]
    return [table for table in found if table.rows]


def _candidate_table(calibration: Calibration) -> Table:
    return Table(
        "What calibration chose from",
        (
            "phase",
            "target",
            "order",
            "thresholds",
            "sparsity",
            "KL divergence",
            "same next token",
            "perplexity",
            "",
        ),
        tuple(
            (
                c.phase,
                percent(c.target),
                c.order.replace("_", " "),
                c.heads.replace("_", " "),
                f"{c.sparsity:.1%}",
                f"{c.kl:.4f}",
                f"{c.top1:.2%}",
                f"{c.perplexity_ratio - 1:+.2%}",
                "chosen" if c.chosen else f"below {c.below} tokens" if c.below else "",
            )
            for c in calibration.candidates
        ),
        "One validation prompt at the longest calibrated length, compared with dense. Below so "
        "many tokens the chosen order does not reach the target, and another stands in.",
    )


def _held_out_table(calibration: Calibration) -> Table:
    return Table(
        "Sparsity at lengths that no fit has seen",
        ("phase", "tokens", "target", "achieved", "the law alone"),
        tuple(
            (
                h.phase,
                str(h.length),
                percent(h.target),
                f"{h.achieved:.1%}",
                "" if h.law is None else f"{h.law:.1%}",
            )
            for h in calibration.held_out
        ),
        "The law alone: threshold = a exp(b target) / length, forward order, one threshold.",
    )
