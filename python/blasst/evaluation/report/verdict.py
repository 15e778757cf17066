"""What an evaluation comes to, in a sentence."""

from collections.abc import Sequence

from blasst.evaluation.settings import Scheme
from blasst.evaluation.summary import Row, rows
from blasst.measure.results import Results

LITTLE = 0.01
"""Perplexity may rise by this share for sparsity to be called cheap."""


def verdict(results: Results) -> str:
    """The most that is skipped at little cost; where nothing is, the least cost."""
    found = rows(results)
    dense = next((row for row in found if row.setting.is_dense), None)
    sparse = [row for row in found if row.setting.target and row.setting.scheme != Scheme.PAPER]
    if not sparse:
        return "No text was read sparsely: what skipping costs was not measured."
    cheap = [row for row in sparse if row.perplexity_change[0] <= LITTLE]
    if cheap:
        return f"{_told(max(cheap, key=lambda row: row.sparsity[0]), dense)}{_more(cheap, sparse)}"
    least = min(sparse, key=lambda row: row.perplexity_change[0])
    return (
        f"No target keeps perplexity within {LITTLE:.0%} of dense. Nearest: {_told(least, dense)}"
    )


def _told(row: Row, dense: Row | None) -> str:
    change, same = row.perplexity_change[0], row.top1[0]
    told = (
        f"{row.sparsity[0]:.1%} of prefill's tiles skipped ({row.setting.name}): perplexity "
        f"{change:+.2%}, {same:.1%} of next tokens the same"
    )
    if dense is None:
        return f"{told}."
    return f"{told}, prefill in {row.prefill_seconds / dense.prefill_seconds:.2f} of dense's time."


def _more(cheap: Sequence[Row], sparse: Sequence[Row]) -> str:
    """That other settings cost more than a little."""
    dear = len(sparse) - len(cheap)
    if not dear:
        return ""
    return (
        f" {dear} of {len(sparse)} settings cost{'s' if dear == 1 else ''} more than {LITTLE:.0%}."
    )
