"""Checks of what Python callers pass, and its forms for the operators."""

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.ops.library import CACHES, DEVICES, call

_INTEGERS = (numbers.Integral, torch.SymInt)
_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)
_FLOAT32 = torch.finfo(torch.float32)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """An error unless it is one of these names."""
    accepted = f"it must be one of {', '.join(choices)}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {accepted}")


def check_flags(**flags: bool) -> None:
    """An error unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be True or False")


def check_positive(name: str, value: float | None, default: str) -> None:
    """An error unless it is None or a number above 0 that is finite and no less in float32.

    Of what is subnormal there nothing may be left: 0, which would mean the default.
    """
    if value is None:
        return
    accepted = f"it must be positive and finite, or None for {default}"
    if not is_number(value):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; {accepted}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ValueError(
            f"{name} is {value}; it must be {_FLOAT32.tiny:.8g} to {_FLOAT32.max:.8g}, a normal "
            f"number in float32, or None for {default}"
        )


def is_number(value: object) -> bool:
    """Whether it is a real number, which True and False are not."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Whether it is a whole number, which True and False are not."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def check_whole_number(name: str, value: object, least: int = 1) -> None:
    """An error unless it is a whole number, and no smaller than `least`."""
    if not is_integer(value):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def whole_numbers(name: str, given: object) -> list[int]:
    """One whole number of 1 or more, or several, as a list.

    Raises:
        TypeError: other things than whole numbers.
        ValueError: one below 1.
    """
    several = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(is_integer(n) for n in several):
        raise TypeError(f"{name} is {given!r}; it must be a whole number")
    if any(n < 1 for n in several):
        raise ValueError(f"{name} is {given!r}; it must be at least 1")
    return [int(n) for n in several]


def check_count(name: str, value: int | None) -> None:
    """An error unless it is None or an integer that the operator can take."""
    if value is None:
        return
    if not is_integer(value):
        raise TypeError(f"{name} is {value!r}; it must be an integer of 0 or more, or None")
    # A compiled call may not ask what a symbol is.
    if not torch.compiler.is_compiling() and value >= 2**63:
        raise ValueError(f"{name} is {value}; it must be 0 or more, and fit in int64")


def phase_of(phase: str | None, q: Tensor) -> str:
    """The phase that was chosen, or that the number of queries says."""
    if phase is None:
        return "decode" if q.dim() == 4 and q.shape[1] == 1 else "prefill"
    check_choice("phase", phase, ("prefill", "decode"))
    return phase


def places_on_cuda(
    places: dict[str, Tensor | None], q: Tensor, k: Tensor, phase: str, max_seqlen_q: int | None
) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """The index tensors as they are read on cuda, and [batch, 1, 1] requests without a query.

    Decode there has no query_lengths: a request without a query gets no keys either.
    """
    if phase == "decode" and places["cu_seqlens_q"] is not None and max_seqlen_q is None:
        raise ValueError(
            "cu_seqlens_q is given without max_seqlen_q; a decode on cuda needs the most rows of a "
            "request, 1 to 16"
        )
    places = {name: _narrowed(index) for name, index in places.items()}
    query_lengths, starts, lengths = (
        places[name] for name in ("query_lengths", "starts", "lengths")
    )
    if phase == "prefill" or query_lengths is None:
        return places, None
    if q.shape[1] != 1:
        raise NotSupportedError(
            f"query_lengths is given for a decode of {q.shape[1]} positions on {q.device}; there "
            "it works with one, and ragged queries (cu_seqlens_q) with any"
        )
    if starts is None:
        starts = torch.zeros_like(query_lengths)
    if lengths is None:
        lengths = torch.full_like(query_lengths, k.shape[1])
    lengths = torch.where(query_lengths > 0, lengths, starts)
    places |= {"query_lengths": None, "starts": starts, "lengths": lengths}
    return places, (query_lengths <= 0)[:, None, None]


def _narrowed(index: Tensor | None) -> Tensor | None:
    """As int32; what is beyond its range stays out of any."""
    if index is None or index.dtype == torch.int32:
        return index
    return index.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def check_indices(indices: dict[str, Tensor | None]) -> None:
    """An error unless all are of a type for indices."""
    for name, index in indices.items():
        if index is not None and index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {index.dtype}; it must be torch.int32 or torch.int64")


def check_page_table(k: Tensor, lengths: Tensor | None, page_table: Tensor | None) -> None:
    """An error if a page id or a length on the device is out of range."""
    if page_table is None or lengths is None:
        raise ValueError("check_pages is set; it needs page_table and lengths")
    found = call(
        "check_pages",
        page_table=page_table,
        lengths=lengths,
        page_size=k.shape[1],
        pages=k.shape[0],
    )
    kind, request, *numbers = found.tolist()
    if kind == 1:
        index, page = numbers
        raise ValueError(
            f"page_table[{request}, {index}] is {page}; it must be 0 to {k.shape[0] - 1}, a page "
            "of k"
        )
    if kind == 2:
        length, room = numbers
        raise ValueError(
            f"lengths[{request}] is {length}; it must be 0 to {room}, what the page table has room "
            "for"
        )


def mask_of(
    window: tuple[int | None, int | None] | None,
    bands: Sequence[Sequence[int]] | Tensor | None,
    blocks: Tensor | None,
    device: torch.device,
) -> dict[str, int | Tensor | None]:
    """The operator's arguments that say, besides `causal`, which keys a query sees."""
    left, right = _sides(window)
    if blocks is not None:
        if blocks.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"blocks is {blocks.dtype}; it must be torch.bool")
        blocks = blocks.to(torch.uint8)
    bands = _bands(bands, device)
    return {"window_left": left, "window_right": right, "bands": bands, "blocks": blocks}


def sinks_of(sinks: Tensor | None) -> Tensor | None:
    """As float32."""
    if sinks is None:
        return None
    if not sinks.is_floating_point():
        raise TypeError(f"sinks is {sinks.dtype}; it must be of a floating-point type")
    return sinks.to(torch.float32)


def scales_of(
    given: dict[str, tuple[Tensor, float | Tensor | None]],
) -> dict[str, Tensor | None]:
    """The operator's scales by name, of the keys or values that are given with each."""
    return {name: _scale_of(name, cache, value) for name, (cache, value) in given.items()}


def _scale_of(name: str, cache: Tensor, value: float | Tensor | None) -> Tensor | None:
    """What the elements of a cache in 8 bits are multiples of, as [1 or batch, 1 or kv_heads]."""
    if value is None:
        return None
    accepted = "it must be a number, or a tensor of them: [], [kv_heads] or [batch, kv_heads]"
    if cache.dtype not in CACHES:
        raise ValueError(
            f"{name} is given, but {name[0]} is {cache.dtype}; it goes with "
            f"{' and '.join(map(str, CACHES))}"
        )
    if not isinstance(value, Tensor) and not is_number(value):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if not isinstance(value, Tensor):
        check_positive(name, value, "1")
        return torch.full((1, 1), value, dtype=torch.float32, device=cache.device)
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}; it must be of a floating-point type")
    if value.requires_grad and torch.is_grad_enabled():
        raise NotSupportedError(
            f"{name} requires a gradient, and keys and values in 8 bits have none: pass "
            f"{name}.detach()"
        )
    if value.dim() > 2 or not value.numel():
        raise ValueError(f"{name} is {list(value.shape)}; {accepted}")
    return value.to(torch.float32).reshape((1,) * (2 - value.dim()) + value.shape)


def _sides(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """The operator's window_left and window_right; -1: no limit."""
    if window is None:
        return -1, -1
    accepted = "it must be (before, after), each an integer of 0 or more, or None for no limit"
    if (
        not isinstance(window, Sequence)
        or isinstance(window, str)
        or any(isinstance(w, bool) or not isinstance(w, int | None) for w in window)
    ):
        raise TypeError(f"window is {window!r}; {accepted}")
    if len(window) != 2 or any(w is not None and w < 0 for w in window):
        raise ValueError(f"window is {window!r}; {accepted}")
    if any(w is not None and w >= 2**31 for w in window):
        raise ValueError(f"window is {window!r}; each side must fit in int32, or be None")
    left, right = (-1 if w is None else w for w in window)
    return left, right


def _bands(bands: Sequence[Sequence[int]] | Tensor | None, device: torch.device) -> Tensor | None:
    """The operator's bands, [heads, 2] int64."""
    if bands is None:
        return None
    try:
        values = torch.as_tensor(bands, device=device)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"bands is {bands!r}; it must be [heads, 2] whole numbers that fit in int64"
        ) from error
    if values.is_floating_point() or values.dtype == torch.bool:
        raise TypeError(f"bands is {values.dtype}; it must be [heads, 2] whole numbers")
    return values.to(torch.int64)


def decision_of(
    threshold: float | Sequence[float] | Tensor | None,
    threshold_scale_factor: float | Sequence[float] | Tensor | None,
    absolute_threshold: float | Sequence[float] | Tensor | None,
    device: torch.device,
) -> dict[str, str | Tensor | None]:
    """The operator's name for the test that was chosen, and its thresholds."""
    has_others = threshold_scale_factor is not None or absolute_threshold is not None
    if not has_others and _is_ready(threshold, device):
        return {"test": "relative", "thresholds": threshold}
    given = [
        (name, test, value)
        for name, test, value in (
            ("threshold", "relative", threshold),
            ("threshold_scale_factor", "scale_factor", threshold_scale_factor),
            ("absolute_threshold", "absolute", absolute_threshold),
        )
        if value is not None
    ]
    if not given:
        return {"test": "none", "thresholds": None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(name for name, *_ in given)} exclude each other; give one")
    [(name, test, value)] = given
    thresholds = _thresholds(name, test, value, device)
    if thresholds.requires_grad and torch.is_grad_enabled():
        raise NotSupportedError(
            "the threshold requires a gradient; dropping a tile or not has none: pass "
            "threshold.detach()"
        )
    return {"test": test, "thresholds": thresholds}


def _thresholds(
    name: str, test: str, value: float | Sequence[float] | Tensor, device: torch.device
) -> Tensor:
    """As [1 or batch, 1 or heads, places]."""
    accepted = "it must be a number, a list of numbers, or a tensor of them"
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} is {value.dtype}; {accepted}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} is {value.layout}; it must be torch.strided")
    if device.type == "cuda":
        _check_host_values(name, test, value)
    if isinstance(value, _NUMBERS) and _FLOAT32.max < abs(value) < math.inf:
        raise ValueError(f"{name} is {value}; it must fit in float32, up to {_FLOAT32.max:.8g}")
    if isinstance(value, _NUMBERS):  # no copy from the host, so that a graph can capture it
        return torch.full((1, 1, 1), value, dtype=torch.float32, device=device)
    try:
        values = torch.as_tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {value!r}; {accepted}") from error
    if values.dim() > 3 or not values.numel():
        raise ValueError(
            f"{name} is {list(values.shape)}; it must be a number, [heads], [1 or batch, 1 or "
            "heads], or [1 or batch, 1 or heads, places]"
        )
    if values.dim() < 3:
        values = values.reshape((1,) * (2 - values.dim()) + values.shape + (1,))
    return values


def _is_ready(value: object, device: torch.device) -> bool:
    """Whether thresholds are as the operator takes them, as all those of a model's layers are.

    What the rest does costs a layer 10 us of the host's time.
    """
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.float32
        and value.layout is torch.strided
        and value.dim() == 3
        and value.device == device
        and value.numel() > 0
        and not value.requires_grad
    )


def _check_host_values(name: str, test: str, value: object) -> None:
    """An error if a number that the host has is no threshold: on cuda nobody looks at it later."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = [] if torch.compiler.is_compiling() else value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        for element in value:
            _check_host_values(name, test, element)
    elif isinstance(value, _NUMBERS):
        if test == "relative" and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be a number from 0 to 1")
        if test == "scale_factor" and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and at least 0")
        if test == "absolute" and math.isnan(value):
            raise ValueError(f"{name} is {value}; it must be a number")


def check_tensors(needed: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """An error unless all are strided tensors on one device that has a backend."""
    [first, *_] = needed
    q = needed[first]
    if isinstance(q, Tensor) and q.device.type not in DEVICES:
        raise NotSupportedError(f"{first} is on {q.device}; blasst runs on: {', '.join(DEVICES)}")
    for name, t in {**needed, **optional}.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, Tensor):
            none = ", or None" if name in optional else ""
            raise TypeError(f"{name} is a {type(t).__name__}; it must be a torch.Tensor{none}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} is {t.layout}; it must be torch.strided")
        if t.device != q.device:
            raise ValueError(
                f"{name} is on {t.device}, {first} on {q.device}; they must share a device"
            )
