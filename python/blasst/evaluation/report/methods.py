"""What the calibration or training of a method found, as tables."""

from collections.abc import Collection
from statistics import mean

from torch import Tensor

from blasst.methods.bsfa import AbsoluteThresholds
from blasst.methods.dhsa_training import Trained
from blasst.pages import Table


def threshold_table(found: AbsoluteThresholds) -> Table:
    """Absolute thresholds: root mean squares over layers, heads and places, in scores."""

    def rms(values: Tensor) -> str:
        known = values[values.isfinite()].double()
        return f"{known.square().mean().sqrt():.3f}" if len(known) else "-"

    spread, error = found.mean_spread(), found.fit_error()
    places = found.table.shape[-1]
    rows = [
        (
            str(keep),
            f"{found.sparsity(keep, places * found.tile_shape[0]):.1%}",
            rms(spread[i]),
            rms(error[i]),
        )
        for i, keep in enumerate(found.keeps)
    ]
    return Table(
        f"Absolute thresholds from {found.prompts} prompts of {places} tiles",
        ("tiles kept", "sparsity", "between prompts", "error of the fit"),
        tuple(rows),
        "Standard deviation between prompts and error of the fit: root mean square, in scores.",
    )


def predictor_table(trained: Collection[Trained]) -> Table:
    """Boundary predictors: how they do on positions that they were not trained on."""
    scores = {
        "precision": [t.precision for t in trained],
        "recall": [t.recall for t in trained],
    }
    return Table(
        f"Boundary predictors of {len(trained)} layers, on positions not trained on",
        ("", "mean", "lowest"),
        tuple(
            (name, f"{mean(values):.0%}", f"{min(values):.0%}") for name, values in scores.items()
        ),
    )
