"""The mask interface: which keys, and which of its queries, each request uses.

Transformers asks it once a pass for each pattern of layers, and hands the answer on to them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from blasst.errors import NotSupportedError
from blasst.hf.layers import NAME
from blasst.hf.positions import are_packed, follow, take
from blasst.hf.tracing import TRACES_CELLS, is_at_hand, is_deferred


class Pattern(NamedTuple):
    """What a mask function stands for."""

    causal: bool
    window: int | None = None
    """Keys that a query sees, itself included; None: all."""
    positions: Tensor | None = None
    """position_ids [1 or batch, queries] of the pass; None: not known."""
    cache: Any = None
    """Of the pass; None: none, or not known."""


class KeyRanges(Tensor):
    """[batch, 1, 1, 6] int32, see `key_ranges`, with what the host knows of it.

    Four dimensions, for Transformers passes those on untouched. A model that computes with its mask
    as if it held a number for every query and key gets an error.
    """

    ranges: Tensor
    """The same numbers as an ordinary tensor [batch, 6]."""
    causal: bool
    window: int
    """0: none."""
    everything: bool
    """Every request uses all keys and queries."""
    positions: Tensor | None
    """See `Pattern`."""
    cache: Any
    """See `Pattern`."""
    queries: int
    """How many the mask was made for."""
    keys: int | None
    """How many the mask was made for; None: not known."""
    packed: dict[int, tuple[Tensor, Any]]
    """By id of position_ids, which it keeps alive: what `packed.find` made of them."""

    @property
    def lengths(self) -> list[int]:
        """Keys in use of each request; the first time, waits for the device."""
        if "_lengths" not in self.__dict__:
            self._lengths = (self.ranges[:, 1] - self.ranges[:, 0]).tolist()
        return self._lengths

    @classmethod
    def of(
        cls,
        ranges: Tensor,
        pattern: Pattern,
        window: int,
        everything: bool,
        queries: int,
        keys: int | None = None,
    ) -> "KeyRanges":
        """From [batch, 6]."""
        made = ranges[:, None, None].as_subclass(cls)
        made.ranges, made.positions, made.everything = ranges, pattern.positions, everything
        made.causal, made.window, made.cache = pattern.causal, window, pattern.cache
        made.packed, made.queries, made.keys = {}, queries, keys
        if everything and keys is not None:
            made._lengths = [keys] * ranges.shape[0]
        return made

    @classmethod
    def plain(
        cls, batch: int, queries: int, keys: int, causal: bool, device: torch.device
    ) -> "KeyRanges":
        """All keys and all queries of every request."""
        # Not copied from the host, to wait for none.
        numbers = (0, keys, queries, 0, int(causal), queries)
        columns = [torch.full((batch,), n, dtype=torch.int32, device=device) for n in numbers]
        return cls.of(torch.stack(columns, -1), Pattern(causal), 0, True, queries, keys)

    def for_queries(self, queries: int) -> "KeyRanges":
        """Without a causal pattern: the same keys for another number of queries."""
        known = self.__dict__.setdefault("_others", {})
        if queries not in known:
            ranges = _for_queries(self.ranges, queries)
            made = KeyRanges.of(ranges, Pattern(False), 0, self.everything, queries, self.keys)
            known[queries] = made
        return known[queries]

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """What moves or describes a tensor is done; what computes with it is an error."""
        name = func.__name__
        if name == "__getitem__" and _keeps_all_requests(args[1]):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if name not in _MOVING and name not in _DESCRIBING:
                raise NotSupportedError(
                    f"the model computes ({name}) with its attention mask, as models do that "
                    "choose keys for each query; under attn_implementation="
                    f"{NAME!r} a mask only says which keys a request uses"
                )
            result = func(*args, **(kwargs or {}))
            if name not in _MOVING or isinstance(result, cls):
                return result
            if result.dtype != torch.int32:
                raise NotSupportedError(
                    f"the model turns its attention mask into {result.dtype}; under "
                    f"attn_implementation={NAME!r} it holds key ranges"
                )
            moved = result.as_subclass(cls)
            moved.__dict__.update(args[0].__dict__)
            moved.__dict__.pop("_others", None)
            moved.packed = {}
            if moved.positions is not None:
                moved.positions = moved.positions.to(result.device)
            moved.ranges = result[:, 0, 0]
            return moved


def with_facts(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """The mask as `KeyRanges` for these queries; as it is while a pass is compiled or captured.

    A mask that is not causal holds for any number of queries: models make one for one query and
    use it for all. Numbers are read once a pass.

    Args:
        mask: what `key_ranges` returned, or a model's own [batch, 1, 1, keys]: true, or 0, at keys
            that all its queries see; false, or the least number there is, at padding.
        queries: of a request.
        keys: of a request.
    """
    if mask is None:
        return mask
    is_known = isinstance(mask, KeyRanges)
    if is_known and torch.compiler.is_compiling():  # layers are compiled, the model is not
        return _with_packed_marked(mask.ranges, mask.positions)[:, None, None]
    # The attributes of a subclass of Tensor are slow.
    if is_deferred((mask.ranges if is_known else mask).device):
        return mask
    facts = mask if is_known else _facts(mask, queries, keys)
    if facts is None:
        return mask
    if facts.queries == queries:
        return facts
    if facts.causal:
        raise NotSupportedError(
            f"a layer has {queries} queries, but the model's causal mask is for {facts.queries}: "
            "blasst cannot tell which keys each of them sees"
        )
    return facts.for_queries(queries)


def _facts(mask: Tensor, queries: int, keys: int) -> KeyRanges | None:
    """What an ordinary tensor says, noted at the tensor; None: neither of the two kinds."""
    # An inference tensor does not count its edits.
    version = None if mask.is_inference() else mask._version
    is_own = mask.dtype != torch.int32
    noted_at, facts = getattr(mask, "blasst_facts", (None, None))
    if facts is not None and noted_at == version and not (is_own and version is None):
        return facts
    if is_own and mask.shape[1:] == (1, 1, keys):
        ranges = _ranges_of_padding(mask[:, 0, 0], queries)
        window, causal, made_for = 0, False, queries
    elif not is_own and mask.shape[1:] == (1, 1, COLUMNS):
        ranges = mask[:, 0, 0]
        window, causal, made_for = ranges[0, 3:].tolist()
        require((ranges[:, 2] >= 0).all(), PACKED_COMPILED, NotSupportedError)
    else:
        return None
    facts = KeyRanges.of(ranges, Pattern(bool(causal)), window, False, made_for)
    mask.blasst_facts = version, facts
    return facts


def ranges_when_compiled(mask: Tensor, queries: int, causal: bool) -> Tensor:
    """[batch, 6] of what `key_ranges` returned, for the queries of a layer that says `causal`."""
    ranges = mask[:, 0, 0]
    if causal:  # as the mask is, else an error: see `require_made_for`
        return ranges
    return torch.where(ranges[:, 4:5] > 0, ranges, _for_queries(ranges, queries))


def require_made_for(ranges: Tensor, queries: int) -> None:
    """A check in the graph that a causal mask is used with the queries that it was made for."""
    require(
        ranges[0, 5] == queries,
        f"a layer has {queries} queries, but the model's causal mask is for another number",
    )


def _for_queries(ranges: Tensor, queries: int) -> Tensor:
    """[batch, 6] of a pattern that is not causal, for another number of queries."""
    first, last, made_for, window, causal, _ = ranges.unbind(1)
    count = torch.full_like(made_for, queries)
    end = torch.where(made_for < 0, -count, count)  # several packed sequences
    return torch.stack([first, last, end, window, causal, count], 1)


def _ranges_of_padding(padding: Tensor, queries: int) -> Tensor:
    """[batch, 6] of a model's own mask [batch, keys], added to the scores unless it is bool."""
    used = padding
    if padding.dtype != torch.bool:
        used = padding == 0
        require((used | (padding <= -1e4)).all(), _BIAS, may_wait=queries > 1)
    first, last = _first_and_last(used, may_wait=queries > 1)
    return _ranges(first, last, torch.full_like(last, queries), queries, Pattern(False), 0)


def _first_and_last(used: Tensor, *, may_wait: bool = True) -> tuple[Tensor, Tensor]:
    """[batch]: first key and end of the keys, which must follow each other, of [batch, keys]."""
    first = used.int().argmax(-1)
    last = first + used.sum(-1)
    index = torch.arange(used.shape[-1], device=used.device)
    is_whole = (used == ((index >= first[:, None]) & (index < last[:, None]))).all()
    require(is_whole, _HOLES, may_wait=may_wait)
    return first, last


_MOVING = {"to", "cuda", "cpu", "clone", "detach", "contiguous", "pin_memory", "__deepcopy__"}
_DESCRIBING = {
    *("__get__", "__len__", "__hash__", "__repr__", "__format__", "__reduce_ex__", "as_subclass"),
    *("size", "dim", "ndimension", "numel", "stride", "storage_offset", "element_size"),
    *("is_contiguous", "is_floating_point", "is_complex", "get_device", "data_ptr"),
    *("untyped_storage", "record_stream", "requires_grad_", "_is_view", "is_conj", "is_neg"),
}


def _keeps_all_requests(index: Any) -> bool:
    """Whether an index, of a mask [batch, heads, queries, keys], only cuts its keys."""
    whole = slice(None)
    return (
        isinstance(index, tuple)
        and len(index) == 4
        and all(part == whole for part in index[:3])
        and isinstance(index[3], slice)
        and index[3].start in (None, 0)
        and index[3].step is None
    )


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The mask interface: which keys, and which of its queries, each request uses.

    Args:
        batch_size: requests.
        q_length: queries a request.
        kv_length: keys a request has room for.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: the pattern: causal, sliding window or all keys; packed sequences.
        attention_mask: [batch, positions] bool, false at padding.
        device: where the ranges go.

    Returns:
        [batch, 1, 1, 6] int32: first key, end of the keys, end of the queries; sliding window (0:
        none), causal, queries. The last three are the same for all requests. A `KeyRanges`;
        an ordinary tensor in a pass that is compiled, captured in a CUDA graph, or that a compiled
        one may follow (`q_offset` a tensor), where a negative end of the queries is that of
        several packed sequences.

    Raises:
        ValueError: padding between tokens, or a mask of another shape.
        NotSupportedError: another pattern.
    """
    position_ids, cache = take()
    pattern = _pattern(mask_function)._replace(positions=position_ids, cache=cache)
    _refuse_holding_several(cache, q_offset)
    window = pattern.window if pattern.window is not None and pattern.window < kv_length else 0
    tracing = torch.compiler.is_compiling()
    deferred = is_deferred(torch.device(device))
    for_compiled = deferred or isinstance(q_offset, Tensor)
    if not deferred:
        q_offset = int(q_offset)
    first_query = q_offset - kv_offset if pattern.causal else 0
    end = first_query + q_length if pattern.causal else kv_length
    _check_padding(attention_mask, kv_offset + end)
    everything = not for_compiled and end == kv_length
    if everything and attention_mask is not None:
        everything = bool(attention_mask[:, kv_offset : kv_offset + end].all())
    if everything:
        row = [0, kv_length, q_length, window, int(pattern.causal), q_length]
        ranges = torch.tensor([row], dtype=torch.int32, device=device).expand(batch_size, -1)
        made = KeyRanges.of(ranges, pattern, window, everything, q_length, kv_length)
        # Asked while the device has little to do yet, not by the first layer behind its products.
        if position_ids is not None and q_length > 1 and follow(position_ids, first_query):
            made.packed[id(position_ids)] = position_ids, None
        return made

    used = (torch.arange(kv_length, device=device) < end).expand(batch_size, -1)
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        used = used & padding[:, kv_offset : kv_offset + kv_length]
    first, last = _first_and_last(used)
    # A request that is padded on the right has as many trailing queries of padding.
    all_queries = torch.full_like(last, q_length)
    queries = (last - first_query).clamp(0, q_length) if pattern.causal else all_queries
    ranges = _ranges(first, last, queries, q_length, pattern, window)
    if for_compiled:
        made = _with_packed_marked(ranges, pattern.positions)[:, None, None]
        if not tracing:
            made.positions = pattern.positions
        if not deferred:  # for layers that are not compiled after all
            facts = KeyRanges.of(ranges, pattern, window, False, q_length)
            made.blasst_facts = None if made.is_inference() else made._version, facts
        return made
    return KeyRanges.of(ranges, pattern, window, everything, q_length, kv_length)


COLUMNS = 6
"""Of what `key_ranges` returns."""


def _ranges(
    first: Tensor, last: Tensor, used: Tensor, queries: int, pattern: Pattern, window: int
) -> Tensor:
    """[batch, 6] int32 of [batch] each."""
    same = [torch.full_like(last, n) for n in (window, int(pattern.causal), queries)]
    return torch.stack([first, last, used, *same], -1).to(torch.int32)


_HOLES = (
    "attention_mask has padding between tokens of a request; blasst needs the tokens of a request "
    "to follow each other (pad on the left for generation; where the cache begins with a prefix, "
    "as in prefix tuning, padding on the left lies between prefix and prompt: pass requests of "
    "one length, or one at a time)"
)
_BIAS = (
    "attention_mask adds other numbers to the scores than 0 and the least there is; blasst does no "
    "biases"
)
PACKED_COMPILED = (
    "position_ids start anew within a pass or behind other tokens in the cache: packed sequences, "
    "of which a pass that is compiled or captured in a CUDA graph must be told cu_seq_lens_q and "
    "cu_seq_lens_k"
)


BEHIND_OTHERS = (
    "a sequence starts behind other tokens in the cache, as position_ids say, or continues one of "
    "several there; packed sequences must be passed whole, in one pass, and cannot be continued"
)


def _refuse_holding_several(cache: Any, q_offset: int | Tensor) -> None:
    """An error unless a cache that packed sequences were put into begins anew."""
    if getattr(cache, "blasst_holds_several", False):
        require(torch.as_tensor(q_offset) == 0, BEHIND_OTHERS, NotSupportedError)
        cache.blasst_holds_several = False


def _with_packed_marked(ranges: Tensor, position_ids: Tensor | None) -> Tensor:
    """[batch, 6] for layers that are not told position_ids: a negative end of packed queries."""
    if position_ids is None:
        return ranges
    sign = torch.ones_like(ranges)
    sign[:, 2] -= 2 * are_packed(ranges, position_ids).int()
    return ranges * sign


def _check_padding(attention_mask: Tensor | None, end: int | Tensor) -> None:
    if attention_mask is None:
        return
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}; it must be [batch, positions]"
        )
    if isinstance(end, int) and attention_mask.shape[1] < end:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but this pass ends at "
            f"position {end}; it must cover the tokens in the cache as well"
        )


def noted(mask: Tensor | None) -> dict[Any, Any]:
    """What the layers of one pass share: kept by its mask; empty where there is none to keep it."""
    if mask is None or torch.compiler.is_compiling():
        return {}
    return mask.__dict__.setdefault("blasst_noted", {})


def require(
    condition: Tensor,
    message: str,
    error: type[Exception] = ValueError,
    *,
    may_wait: bool = True,
) -> None:
    """An error unless `condition` [] holds; while traced or captured, a check in the graph.

    Args:
        condition: on the device that knows.
        message: of the error.
        error: its type.
        may_wait: for a GPU. A decode step may not: the check is then the GPU's, which prints what
            fits of the message, and a later call fails.
    """
    if is_deferred(condition.device) or not (may_wait or is_at_hand(condition.device)):
        torch._assert_async(condition, _for_gpu(message))
    elif not condition:
        raise error(message)


def _for_gpu(message: str) -> str:
    """As much of a message as a check on a GPU takes: fewer than 255 bytes."""
    said = message.encode()
    return message if len(said) < 255 else f"{said[:251].decode(errors='ignore')}..."


def _pattern(mask_function: Callable) -> Pattern:
    """What a mask function stands for; an error if the operator cannot do it."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(True)  # without its name, which torch 2.11 cannot trace
    if torch.compiler.is_compiling() and not TRACES_CELLS:
        return Pattern(*_pattern_when_compiled(mask_function))
    parts = dict(_parts(mask_function))
    names = parts.keys()
    if names == {"bidirectional_mask_function"}:
        return Pattern(False)
    if "causal_mask_function" in names and names <= {
        "causal_mask_function",
        "sliding_window_overlay",
    }:
        overlay = parts.get("sliding_window_overlay")
        return Pattern(True, overlay and _cell(overlay, "sliding_window"))
    raise NotSupportedError(
        f"mask pattern {' & '.join(sorted(names))} is not supported by attn_implementation="
        f"{NAME!r}; it does causal, causal with a sliding window, and bidirectional masks with "
        "padding at either end"
    )


@torch.compiler.assume_constant_result
def _pattern_when_compiled(mask_function: Callable) -> tuple[bool, int | None]:
    return _pattern(mask_function)[:2]


def _parts(mask_function: Callable) -> Iterator[tuple[str, Callable]]:
    """The patterns that `masking_utils` put together, by the name of what made them."""
    name = mask_function.__qualname__.split(".")[0]
    if name == "and_masks":
        for part in mask_function.__closure__[0].cell_contents:
            yield from _parts(part)
    elif name == "or_masks":
        yield from _parts_of_union(mask_function.__closure__[0].cell_contents)
    else:
        yield name, mask_function


def _parts_of_union(mask_functions: Iterable[Callable]) -> Iterator[tuple[str, Callable]]:
    """Parts of `or_masks`: blocks that see each other, of images say, add nothing to a text."""
    for function in mask_functions:
        for name, part in _parts(function):
            if name != "blockwise_overlay" or (_cell(part, "block_sequence_ids") >= 0).any():
                yield name, part


def _cell(function: Callable, name: str) -> Any:
    """What an inner function knows under a name of the function around it."""
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return dict(cells)[name].cell_contents
