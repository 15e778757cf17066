"""What was measured, as parts of the page that its reader can change."""

from collections.abc import Iterator
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
    groups = [*_calibrated_tiles(results), *_tiles_by_threshold(results)]
    if not groups:
        return None
    return Panel("tiles", "Kept tiles by layer and head", {"groups": groups})


def _calibrated_tiles(results: Results) -> Iterator[dict[str, Any]]:
    found = sorted(results.all("tiles"), key=lambda item: item[0][1:])
    if not found:
        return
    [(name, *_), first], *_ = found
    yield _about_tiles("calibrated thresholds, by target", name, first) | {
        "kept": [value["kept"] for _, value in found],
        "settings": [
            {
                "name": _setting_name(Setting(scheme, target), value),
                "picture": i,
                "skipped": value["skipped"],
            }
            for i, ((_, scheme, target), value) in enumerate(found)
        ],
    }


def _tiles_by_threshold(results: Results) -> Iterator[dict[str, Any]]:
    """One picture: of each tile, how many of the thresholds keep it."""
    for (name,), value in results.all("thresholds"):
        settings = zip(value["thresholds"], value["skipped"], strict=True)
        yield _about_tiles("one threshold for all heads", name, value) | {
            "kept": [value["kept"]],
            "settings": [
                {"name": f"threshold {threshold:.2g}", "picture": 0, "level": i, "skipped": skipped}
                for i, (threshold, skipped) in enumerate(settings)
            ],
        }


def _about_tiles(title: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": title,
        "about": (
            f"{name}, {value['length']} tokens: queries from top to bottom, keys from left to "
            f"right, a cell for {value['length'] / value['cells']:.0f} tokens of each."
        ),
        "cells": value["cells"],
        "layers": [{"name": f"layer {n}", "heads": heads} for n, heads in value["layers"]],
    }


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
