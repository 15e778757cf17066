"""Tables of thresholds in a safetensors file beside config.json, which they are too large for."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from blasst.files import open_tensors

TABLES_FILE = "blasst_thresholds.safetensors"
_METADATA = "sparse_attention_config.blasst"
_TABLE = "ln_threshold"
Find = Callable[[str], Path]
"""Where a file is that lies beside a model's config.json; a ValueError if there is none."""


def in_no_folder(file: str) -> Path:
    """Of a configuration that nobody knows the folder of."""
    raise ValueError(
        f"sparse_attention_config has its tables in {file}, beside the config.json that it was "
        "saved in: load the model from there"
    )


def split(entry: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """An entry as it stands in config.json, and the file beside it; None: there need be none.

    Args:
        entry: what `SparseAttention.to_dict` gave.
    """
    own = entry.get("blasst")
    if own is None or "tables" in own:
        return entry, None
    tensors: dict[str, torch.Tensor] = {}
    about = _without_tables(own, tensors)
    if not tensors:
        return entry, None
    # Of one entry always the same bytes: the order of the names is theirs.
    content = save(dict(sorted(tensors.items())), {_METADATA: json.dumps(about)})
    place = {"file": TABLES_FILE, "sha256": hashlib.sha256(content).hexdigest()}
    return {**entry, "blasst": {"version": own["version"], "tables": place}}, content


def _without_tables(node: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """The same with a tensor's name for each table, which goes to `tensors`."""
    if isinstance(node, list):
        return [_without_tables(part, tensors, f"{path}.{i}") for i, part in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    found = {}
    for key, value in node.items():
        name = f"{path}.{key}".lstrip(".")
        if key == _TABLE:
            tensors[name], found[key] = _padded(value), name
        else:
            found[key] = _without_tables(value, tensors, name)
    return found


def _padded(table: Any) -> torch.Tensor:
    """[lengths, targets, layers, heads]; NaN for the heads that a layer has fewer than others."""
    most = max(len(row) for row in table[0][0])
    rows = [
        [[[*row, *[math.nan] * (most - len(row))] for row in layers] for layers in by_target]
        for by_target in table
    ]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def read_tables(file: str, sha256: str, find: Find) -> dict[str, Any]:
    """The phases that were split off into a file.

    Raises:
        ValueError: it is missing, cannot be read, or is not the one that was written.
    """
    path = find(file)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path}, the tables of sparse_attention_config: {error}") from None
    if found != sha256:
        raise ValueError(
            f"{path} holds the tables of another calibration than config.json names (sha256 "
            f"{found[:12]}..., not {sha256[:12]}...): copy both from one place, or calibrate again"
        )
    with open_tensors(path) as tensors:
        about = json.loads((tensors.metadata() or {}).get(_METADATA, "{}"))
        about.pop("version", None)
        return _with_tables(about, tensors)


def _with_tables(node: Any, tensors: safe_open) -> Any:
    if isinstance(node, list):
        return [_with_tables(part, tensors) for part in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _rows(tensors.get_tensor(value)) if key == _TABLE else _with_tables(value, tensors)
        for key, value in node.items()
    }


def _rows(table: torch.Tensor) -> list[Any]:
    """Lists, without the heads that a layer lacks."""
    rows = table.flatten(0, 2)
    kept = [[round(x, 3) for x in row if not math.isnan(x)] for row in rows.tolist()]
    lengths, targets, layers, _ = table.shape
    by_target = [kept[i : i + layers] for i in range(0, len(kept), layers)]
    return [by_target[i : i + targets] for i in range(0, lengths * targets, targets)]
