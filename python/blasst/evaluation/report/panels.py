"""What was measured, as parts of the page that its reader can change."""

from typing import Any

from blasst.evaluation.settings import Setting
from blasst.measure.results import Results
from blasst.pages import Panel


def panels_of(results: Results) -> list[Panel]:
    """The panels that there are numbers for."""
    found = [_tiles(results), _tokens(results)]
    return [panel for panel in found if panel is not None]


def _tiles(results: Results) -> Panel | None:
    """The kept tiles of one text, by layer and head."""
    found = sorted(results.all("tiles"), key=lambda item: item[0][1:])
    if not found:
        return None
    [(name, *_), first], *_ = found
    data = {
        "about": (
            f"{name}, {first['length']} tokens: queries from top to bottom, keys from left to "
            f"right, a cell for {first['length'] / first['cells']:.0f} tokens of each."
        ),
        "cells": first["cells"],
        "layers": [{"name": f"layer {n}", "heads": heads} for n, heads in first["layers"]],
        "settings": [
            {
                "name": _setting_name(Setting(scheme, target), value),
                "kept": value["kept"],
                "skipped": value["skipped"],
            }
            for (_, scheme, target), value in found
        ],
    }
    return Panel("tiles", "Kept tiles by layer and head", data)


def _setting_name(setting: Setting, value: dict[str, Any]) -> str:
    lowest, median, highest = value["thresholds"]
    spread = "" if lowest == highest else f" ({lowest:.2g} to {highest:.2g})"
    return f"{setting.name}: threshold {median:.2g}{spread}, {value['sparsity']:.1%} skipped"


def _tokens(results: Results) -> Panel | None:
    """The texts' last tokens, coloured."""
    by_text: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for (name, scheme, target), value in results.all("text"):
        if "cost" in value:
            setting = {"name": Setting(scheme, target).name, "costs": value["cost"]}
            by_text.setdefault(name, []).append((target, scheme, setting))
    texts = [
        {
            "name": name,
            "pieces": results.get("pieces", name),
            "settings": [setting for *_, setting in sorted(some, key=lambda one: one[:2])],
        }
        for name, some in by_text.items()
    ]
    if not texts:
        return None
    data = {
        "about": (
            "Red: the token is less likely than after dense attention; blue: more. As strong as "
            "can be from 0.9 nats on, which is 0.4 times as likely. A click on a token tells the "
            "number."
        ),
        "texts": texts,
    }
    return Panel("tokens", "What skipping cost each token", data)
