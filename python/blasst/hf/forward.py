"""The attention interface: one layer's attention, as its mask, thresholds and policy say."""

from typing import Any

import torch
from torch import Tensor, nn

from blasst.errors import NotSupportedError
from blasst.hf import eight_bit, operator, packed, recording
from blasst.hf.latents import take
from blasst.hf.layers import NAME, tower_and_layer, wants_weights
from blasst.hf.masks import (
    COLUMNS,
    KeyRanges,
    noted,
    ranges_when_compiled,
    require,
    require_made_for,
    with_facts,
)
from blasst.hf.packed import Sequences
from blasst.hf.tensor_parallel import Share, share_of
from blasst.hf.thresholds import NAMES, Pass, options_of, options_when_compiled
from blasst.hf.tracing import is_at_hand
from blasst.hf.visits import policy_of, visit_under
from blasst.ops.attention import Result, autocast
from blasst.policies import Call

Inputs = tuple[Tensor, Tensor, Tensor]
"""Query, key and value, [batch, length, heads, size]."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface.

    Args:
        module: the attention layer.
        query: [batch, heads, query_length, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        value: [batch, kv_heads, keys, value_dim].
        attention_mask: what `key_ranges` returned. It decides what is causal; None: the model asked
            for no mask, see `_refuse_unclear`.
        dropout: must be 0.
        scaling: softmax scale.
        is_causal: of no effect where there is a mask; without one, needed from a layer whose class
            says that it is causal.
        sliding_window: keys that a query sees, itself included.
        softcap: cap of the scores.
        s_aux: [heads] sink logits.
        kwargs: what else the model passes on: `cu_seq_lens_q`, `cu_seq_lens_k` and `position_ids`
            tell packed sequences apart; anything else that changes the result is an error.

    Returns:
        [batch, query_length, heads, value_dim], and no attention weights.
    """
    query = _for_each_request(query, key)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    mask = with_facts(attention_mask, queries, keys)
    _refuse_unsupported(module, dropout, mask, kwargs)
    layer_window = sliding_window if sliding_window is not None and sliding_window < keys else 0
    if mask is None:
        _refuse_unclear(module, is_causal, queries, keys)
    says_causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    ranges, causal, window = _pattern(module, mask, says_causal, layer_window, queries, keys)
    phase = _phase(queries, query, key, value)
    taken = take(module, phase, query, key, value)
    query, key, value = autocast(*taken[:3])  # thresholds are those of the type that runs
    query, scales = eight_bit.read(query, key, value)
    sequences = packed.find(module, mask, causal, query, key, kwargs)
    inputs = tuple(t.transpose(1, 2) for t in (query, key, value))
    lengths = _Lengths(mask, ranges, sequences, batch, keys, query.device)
    share = share_of(module, heads)
    test = _test(module, phase, inputs, mask, lengths, share)
    wants_maxima = any(r.wants_maxima for r in recording.active)
    wanting = {"sinks": s_aux is not None, "a soft cap": bool(softcap)}
    wanting["an absolute threshold"] = test.get("absolute_threshold") is not None
    eight_bit.check_level(key, {**wanting, "recorded maxima": wants_maxima})
    result = operator.current().attention(
        **_layout(*inputs, ranges, sequences),
        **test,
        **scales,
        **_visit(module, phase, inputs, lengths, share, causal),
        phase=phase,
        causal=causal,
        scale=scaling,
        window=(window - 1, None) if window else None,
        softcap=softcap,
        sinks=s_aux,
        return_stats=bool(recording.active),
        return_error_bound=any(r.wants_bounds for r in recording.active),
        return_gaps=any(r.wants_gaps for r in recording.active),
        return_tile_maxima=wants_maxima,
        return_tile_mask=any(r.wants_tile_mask for r in recording.active),
    )
    if isinstance(result, Result):
        tower, layer = tower_and_layer(module)
        for active in () if recording.is_second_pass() else recording.active:
            active.of(tower).add(phase, layer, result, share)
        result = result.out
    if sequences is not None:
        result = sequences.spread(result, batch, queries)
    return taken.finish(result), None


def _for_each_request(query: Tensor, key: Tensor) -> Tensor:
    """A query that is the same for all requests is given once (granite_speech's Q-former)."""
    if query.shape[0] == 1 < key.shape[0]:
        return query.expand(key.shape[0], -1, -1, -1)
    return query


def _test(
    module: nn.Module,
    phase: str,
    inputs: Inputs,
    mask: Tensor | None,
    lengths: "_Lengths",
    share: Share | None,
) -> dict[str, Any]:
    """Thresholds, those of this process's heads, order and scores."""
    query, value_dim = inputs[0], inputs[2].shape[-1]
    if torch.compiler.is_compiling():
        test = options_when_compiled(module, phase, query, value_dim, lengths.room, lengths.tensor)
    else:
        one_pass = Pass(
            phase,
            query,
            value_dim,
            query.shape[2] if share is None else share.total,
            lengths.room,
            lengths.simplest,
            lengths.known,
            noted(mask),
            operator.current().tile_of,
        )
        test = options_of(module, one_pass)
    if share is None:
        return test
    return {n: v if n in NAMES else share.of_thresholds(v) for n, v in test.items()}


def _visit(
    module: nn.Module,
    phase: str,
    inputs: Inputs,
    lengths: "_Lengths",
    share: Share | None,
    causal: bool,
) -> dict[str, Any]:
    """Bands and blocks that the layer's policy leaves."""
    policy = policy_of(module)
    if policy is None:
        return {"bands": None, "blocks": None}
    query, key, _ = inputs
    _, layer = tower_and_layer(module)
    call = Call(layer, phase, query, key, lengths.ends)
    visit = visit_under(policy, module, call, causal, lengths.longest, is_packed=lengths.are_packed)
    if share is not None and any(part is not None for part in visit):
        raise NotSupportedError(
            "a policy (blasst.set_policy, blasst_policy) is not supported for a tensor-parallel "
            "model: it would count the heads of this process only"
        )
    return {"bands": visit.bands, "blocks": visit.blocks}


def _phase(queries: int, *inputs: Tensor) -> str:
    """Prefill or decode; a pass that is trained on is no decode, which has no backward pass."""
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return "decode" if queries == 1 and not trained else "prefill"


def _layout(
    query: Tensor, key: Tensor, value: Tensor, ranges: Tensor | None, sequences: Sequences | None
) -> dict[str, Tensor | None]:
    """The inputs as `blasst.attention` takes them: dense, padded or ragged."""
    if sequences is not None:
        return {
            "q": sequences.of_rows(query),
            "k": sequences.of_keys(key),
            "v": sequences.of_keys(value),
            "cu_seqlens_q": sequences.ends_q,
            "cu_seqlens_k": sequences.ends_k,
            "max_seqlen_q": sequences.lengths_q and max(sequences.lengths_q),
            "max_seqlen_k": sequences.lengths_k and max(sequences.lengths_k),
        }
    inputs = {"q": query, "k": key, "v": value}
    if ranges is None:
        return inputs
    starts, lengths, query_lengths = ranges[:, :3].unbind(1)
    return {**inputs, "starts": starts, "lengths": lengths, "query_lengths": query_lengths}


class _Lengths:
    """How many keys each request of a call uses, for those who ask."""

    def __init__(
        self,
        mask: Tensor | None,
        ranges: Tensor | None,
        sequences: Sequences | None,
        batch: int,
        keys: int,
        device: torch.device,
    ) -> None:
        self._mask, self._ranges, self._sequences = mask, ranges, sequences
        self._batch, self._keys, self._device = batch, keys, device
        self.are_packed = sequences is not None

    @property
    def ends(self) -> Tensor | None:
        """[batch] end of the keys in use; None: all."""
        return None if self._ranges is None else self._ranges[:, 1]

    def tensor(self) -> Tensor:
        """[requests] int."""
        if self._sequences is not None:
            return self._sequences.ends_k.diff()
        if self._ranges is None:
            return torch.full((self._batch,), self._keys, dtype=torch.int64, device=self._device)
        return self._ranges[:, 1] - self._ranges[:, 0]

    def simplest(self) -> Tensor | int:
        """The same, or the number that all of them are because nothing says otherwise."""
        if self._sequences is None and self._ranges is None:
            return self._keys
        return self.tensor()

    def numbers(self) -> list[int]:
        """The same on the host."""
        if self._sequences is not None:
            return self._sequences.lengths_k
        if isinstance(self._mask, KeyRanges):
            return self._mask.lengths
        return self.tensor().tolist()

    def known(self) -> list[int]:
        """`numbers`, as far as the host knows them without waiting for the device."""
        if is_at_hand(self._device) or self._sequences is not None:
            return self.numbers()
        # A cache that grows has no more room than its longest request needs.
        return [self._keys] if getattr(self._mask, "keys", None) == self._keys else []

    def longest(self) -> Tensor:
        """Of all requests, []."""
        return self.tensor().max()

    @property
    def room(self) -> int:
        """For how many keys a request there is room."""
        known = self._sequences and self._sequences.lengths_k
        return max(known) if known else self._keys


def _pattern(
    module: nn.Module, mask: Tensor | None, says_causal: bool, window: int, queries: int, keys: int
) -> tuple[Tensor | None, bool, int]:
    """Key ranges [batch, 6] (None: all), whether causal, and the sliding window (0: none).

    The mask decides, if the model asked for one; what the layer says must not contradict it.
    """
    name = type(module).__name__
    if mask is None:
        ranges, causal, found = None, says_causal, 0
    elif isinstance(mask, KeyRanges):
        if mask.keys not in (keys, None):
            raise NotSupportedError(
                f"{name} has {keys} keys, but the model's mask is for {mask.keys}: blasst cannot "
                "tell which of them each query sees"
            )
        ranges = None if mask.everything else mask.ranges
        causal, found = mask.causal, mask.window
    else:  # compiled or captured: the pattern must be known before the numbers are
        ranges, causal, found = (
            ranges_when_compiled(mask, queries, says_causal),
            says_causal,
            window,
        )
        if (seen := noted(mask)).get("pattern") != (causal, window, queries):
            seen["pattern"] = causal, window, queries
            _require_pattern(name, ranges, causal, window, queries)
    if window and window != found:
        raise ValueError(
            f"{name} has a sliding window of {window}, but the model's mask has {found or 'none'}"
        )
    if found and not causal:
        raise NotSupportedError(f"{name}: a sliding window without a causal mask is not supported")
    return ranges, causal, found


def _refuse_unclear(module: nn.Module, is_causal: bool | None, queries: int, keys: int) -> None:
    """An error where it cannot be told what a call without a mask sees.

    Every model that is causal asks for a mask, and always gets one. So a layer that says it is
    causal and has none stands outside of its model, or means every key, as BridgeTower's image
    layers do: Transformers' eager attention then sees every key, its SDPA the earlier ones. A
    layer that does not say so (cross-attention, an image encoder) sees every key.
    """
    name = type(module).__name__
    if queries == 1:  # sees every key in either case
        return
    if is_causal is None and getattr(module, "is_causal", False):
        raise NotSupportedError(
            f"{name} says is_causal=True and has {queries} queries over {keys} keys, but the model "
            "made no mask: blasst cannot tell whether each query sees every key or the earlier "
            "ones; set is_causal=False on the layer, or pass it a mask or is_causal"
        )
    if is_causal and queries != keys:
        raise NotSupportedError(
            f"{name} is causal and has {queries} queries over {keys} keys, but the model made no "
            "mask: blasst cannot tell which key each query stands at"
        )


def _require_pattern(name: str, ranges: Tensor, causal: bool, window: int, queries: int) -> None:
    """A compiled pass follows the layer; checks in the graph that its mask says the same."""
    require(
        ranges[0, 3] == window,
        f"{name} passes a sliding window of {window or None} to attention, but the model's mask "
        "has another",
    )
    require_made_for(ranges, queries)
    if queries > 1:
        require(
            ranges[0, 4] == causal,
            f"{name} asks for is_causal={causal}, but the model's mask says otherwise",
        )


def _refuse_unsupported(
    module: nn.Module, dropout: float, mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """An error for everything that would change the result and is not supported."""
    name = type(module).__name__
    if dropout:
        raise NotSupportedError(
            f"{name} asks for attention dropout {dropout}; blasst supports 0 only (model.eval(), "
            "or attention_dropout=0)"
        )
    is_known = mask is None or isinstance(mask, KeyRanges)
    if not is_known and (mask.dtype != torch.int32 or mask.shape[1:] != (1, 1, COLUMNS)):
        raise NotSupportedError(
            f"attention_mask of {name} is a {mask.dtype} tensor of shape {list(mask.shape)}: the "
            "model, or its caller, prepares a number for every "
            "query and key; blasst takes [batch, positions] padding masks, no prepared 4-d ones"
        )
    for argument in _UNSUPPORTED:
        if kwargs.get(argument) is not None:
            raise NotSupportedError(
                f"{argument} (of {name}) is not supported by attn_implementation={NAME!r}"
            )
    if kwargs.get("output_attentions") or wants_weights(module.config):
        raise NotSupportedError(
            "output_attentions is not supported: blasst never forms the weights"
        )


_UNSUPPORTED = (
    "seq_idx",
    "position_bias",
    "head_mask",
    "block_table",
    "block_indices",
    "indices",
    "sinks",
)
"""Arguments that change what a layer computes, under the names that Transformers gives them."""
