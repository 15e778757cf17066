"""What an evaluation comes to, in a sentence."""

from collections.abc import Mapping, Sequence

from blasst.evaluation.settings import Scheme, Setting
from blasst.evaluation.summary import Row, Timing, longest_timings, rows
from blasst.measure.results import Results

LITTLE = 0.01
"""Perplexity may rise by this share for sparsity to be called cheap."""


def verdict(results: Results) -> str:
    """The most that is skipped at little cost; where nothing is, the least cost."""
    found, times = rows(results), longest_timings(results)
    sparse = [row for row in found if row.setting.target and row.setting.scheme != Scheme.PAPER]
    if not sparse:
        return "No text was read sparsely: what skipping costs was not measured."
    cheap = [row for row in sparse if row.perplexity_change[0] <= LITTLE]
    if cheap:
        most = max(cheap, key=lambda row: row.sparsity[0])
        return f"{_told(most, times)}{_more(cheap, sparse)}"
    least = min(sparse, key=lambda row: row.perplexity_change[0])
    return (
        f"No target keeps perplexity within {LITTLE:.0%} of dense. Nearest: {_told(least, times)}"
    )


def _told(row: Row, times: Mapping[Setting, Timing]) -> str:
    change, same = row.perplexity_change[0], row.top1[0]
    told = (
        f"{row.sparsity[0]:.1%} of prefill's tiles skipped ({row.setting.name}): perplexity "
        f"{change:+.2%}, {same:.1%} of next tokens the same"
    )
    time = times.get(row.setting)
    if time is None or time.dense is None:
        return f"{told}."
    share = time.median / time.dense.median
    return f"{told}, prefill of {time.length} tokens in {share:.2f} of dense's time."


def _more(cheap: Sequence[Row], sparse: Sequence[Row]) -> str:
    """That other settings cost more than a little."""
    dear = len(sparse) - len(cheap)
    if not dear:
        return ""
    return (
        f" {dear} of {len(sparse)} settings cost{'s' if dear == 1 else ''} more than {LITTLE:.0%}."
    )
