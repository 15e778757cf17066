"""The caches of `flash_attn_with_kvcache`: what they hold, and how new keys and values get there.

What can be known without waiting for a device is checked before anything is written. The values of
index tensors on cuda cannot: new keys for which they name no place are dropped there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.ops.arguments import check_indices, is_integer


class Cache(NamedTuple):
    """Keys and values as `attention` reads them."""

    k: Tensor
    """[batch, room, kv_heads, head_dim], or with a page table [pages, page_size, kv_heads,
    head_dim]."""
    v: Tensor
    page_table: Tensor | None
    lengths: Tensor | None
    """[batch] keys of each request, the new ones counted; None: all that there is room for."""


def cache_of(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> Cache:
    """The caches of a call, of which these are the arguments, checked."""
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx and block_table exclude each other")
    if cache_leftpad is not None and not (cache_batch_idx is None and block_table is None):
        raise NotSupportedError(
            "cache_leftpad is given together with block_table or cache_batch_idx"
        )
    _check_caches(q, k_cache, v_cache)
    _check_indices(
        q.shape[0],
        cache_seqlens=cache_seqlens if isinstance(cache_seqlens, Tensor) else None,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    pages, requests = block_table, k_cache.shape[0]
    if cache_batch_idx is not None:
        k_cache, pages = _as_pages("k_cache", k_cache, cache_batch_idx)
        v_cache, _ = _as_pages("v_cache", v_cache, cache_batch_idx)
    elif pages is None and requests != q.shape[0]:
        raise ValueError(f"k_cache is {list(k_cache.shape)}, but q has batch {q.shape[0]}")
    room = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    new = _new_keys(k_cache, v_cache, k, v, cache_seqlens, q.shape[0])
    lengths = _lengths(cache_seqlens, new, room, q)
    if q.device.type == "cpu":
        ends = torch.full((q.shape[0],), room) if lengths is None else lengths
        _check_values(cache_batch_idx, requests, cache_leftpad, block_table, k_cache, ends)
    if lengths is None and pages is not None:
        lengths = torch.full((q.shape[0],), room, device=q.device)
    return Cache(k_cache, v_cache, pages, lengths)


@contextmanager
def appended(cache: Cache, k: Tensor | None, v: Tensor | None) -> Iterator[None]:
    """New keys and values at the end of their requests; if the block raises, what was there before.

    The operator has checks of its own, and they are of a cache that has the new keys.
    """
    if k is None or v is None or k.numel() == 0:
        yield
        return
    caches, new = [_raw(cache.k), _raw(cache.v)], [_raw(k), _raw(v)]
    place = places(cache, k.shape[1])
    if cache.k.device.type != "cpu":  # where they have been looked at
        place, new = only_placed(caches, place, new)
    before = [t[place] for t in caches]
    try:
        _write(caches, place, new)
        yield
    except BaseException:
        _write(caches, place, before)
        raise


def _write(caches: list[Tensor], place: tuple[Tensor, Tensor], values: list[Tensor]) -> None:
    for cache, value in zip(caches, values, strict=True):
        cache[place] = value


def _raw(t: Tensor) -> Tensor:
    """8 bits as whole numbers, for which torch has everything."""
    return t.view(torch.uint8) if t.itemsize == 1 else t


def places(cache: Cache, new: int) -> tuple[Tensor, Tensor]:
    """Page, or request, of each new key, and the place in it: [batch, new], or what broadcasts.

    A key that its request has no room for has a place before or behind the page.
    """
    device, size = cache.k.device, cache.k.shape[1]
    at = (cache.lengths - new)[:, None] + torch.arange(new, device=device)
    if cache.page_table is None:
        return torch.arange(at.shape[0], device=device)[:, None], at
    nth = (at // size).clamp(0, cache.page_table.shape[1] - 1)
    return cache.page_table.to(torch.int64).gather(1, nth), at - nth * size


def only_placed(
    caches: list[Tensor], place: tuple[Tensor, Tensor], new: list[Tensor]
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Places that exist, and what comes there, [batch * new] each, without waiting for the device.

    Instead of a key without a place the first that has one is written once more; where none has
    one, what is there already.
    """
    pages, size = caches[0].shape[:2]
    page, at = (t.flatten() for t in torch.broadcast_tensors(*place))
    exists = (page >= 0) & (page < pages) & (at >= 0) & (at < size)
    row = torch.where(exists, torch.arange(len(at), device=at.device), exists.int().argmax())
    exists = exists[row]
    place = torch.where(exists, page[row], 0), torch.where(exists, at[row], 0)
    return place, [
        torch.where(exists[:, None, None], t.flatten(0, 1)[row], cache[place])
        for t, cache in zip(new, caches, strict=True)
    ]


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q is {list(q.shape)}; it must be [batch, seqlen_q, heads, head_dim]")
    if k_cache.dim() != 4:
        raise ValueError(
            f"k_cache is {list(k_cache.shape)}; it must be [batch, room, kv_heads, head_dim], or "
            "with block_table [pages, page_size, kv_heads, head_dim]"
        )
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache is {list(k_cache.shape)}, but q has head_dim {q.shape[3]}")
    if v_cache.dim() != 4 or v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache is {list(v_cache.shape)}, but k_cache is {list(k_cache.shape)}")


def _check_indices(batch: int, **indices: Tensor | None) -> None:
    check_indices(indices)
    for name, index in indices.items():
        dims, meaning = (2, "[batch, pages a request]") if name == "block_table" else (1, "[batch]")
        if index is not None and (index.dim() != dims or index.shape[0] != batch):
            raise ValueError(
                f"{name} is {list(index.shape)}; it must be {meaning} with batch {batch}"
            )


def _check_values(
    cache_batch_idx: Tensor | None,
    requests: int,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    k_cache: Tensor,
    ends: Tensor,
) -> None:
    """An error for what index tensors hold, on the CPU."""
    if cache_batch_idx is not None:
        _check_range("cache_batch_idx", cache_batch_idx, requests - 1, "a request of k_cache")
    if cache_leftpad is not None:
        _check_range("cache_leftpad", cache_leftpad, ends, "the end of the request's keys")
    if block_table is not None:
        pages, size = k_cache.shape[:2]
        in_use = torch.arange(block_table.shape[1]) * size < ends[:, None]
        _check_range("block_table", block_table, pages - 1, "a page of k_cache", in_use)


def _check_range(
    name: str, index: Tensor, most: int | Tensor, meaning: str, in_use: Tensor | bool = True
) -> None:
    wrong = ((index < 0) | (index > most)) & in_use
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        limit = most[at[0]].item() if isinstance(most, Tensor) else most
        raise ValueError(
            f"{name}{at} is {index[tuple(at)].item()}; it must be 0 to {limit}, {meaning}"
        )


def _as_pages(name: str, cache: Tensor, batch_idx: Tensor) -> tuple[Tensor, Tensor]:
    """The same memory as pages, and the page table that finds each request's."""
    room = cache.shape[1]
    size = next((size for size in (256, 128, 64, 32, 16) if room % size == 0), None)
    behind_each_other = cache.shape[0] == 1 or cache.stride(0) == room * cache.stride(1)
    if size is None or room == 0 or not behind_each_other:
        raise NotSupportedError(
            f"cache_batch_idx is given with {name} {list(cache.shape)} of strides "
            f"{list(cache.stride())}; it works where the requests lie one behind the other, with "
            "room for a multiple of 16 keys"
        )
    pages = cache.unflatten(1, (-1, size)).flatten(0, 1)
    each = room // size
    table = batch_idx.to(torch.int64)[:, None] * each + torch.arange(each, device=cache.device)
    return pages, table


def _new_keys(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    batch: int,
) -> int:
    """How many there are of each request."""
    if k is None and v is None:
        return 0
    if k is None or v is None or cache_seqlens is None:
        raise ValueError("k, v and cache_seqlens go together; new keys need all three")
    new = k.shape[1] if k.dim() == 4 else None
    if k_cache.numel() == 0 and k.numel() > 0:
        raise ValueError(f"k_cache is {list(k_cache.shape)}; it has no room for new keys")
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if t.dtype != cache.dtype:
            raise TypeError(f"{name} is {t.dtype}; it must be {cache.dtype}, as its cache is")
        if t.shape != (batch, new, *cache.shape[2:]):
            wanted = [batch, "new keys" if new is None else new, *cache.shape[2:]]
            raise ValueError(
                f"{name} is {list(t.shape)}; it must be [batch, new keys, kv_heads, head_dim] = "
                f"[{', '.join(map(str, wanted))}]"
            )
        if any(n > 1 and step == 0 for n, step in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{name}_cache is {list(cache.shape)} of strides {list(cache.stride())}, which "
                "overlap; new keys need a place of their own"
            )
    return new


def _lengths(cache_seqlens: int | Tensor | None, new: int, room: int, q: Tensor) -> Tensor | None:
    """With the new keys."""
    if cache_seqlens is None:
        return None
    most = room - new
    accepted = f"the cache has room for {room}, so that it must be 0 to {most}"
    if isinstance(cache_seqlens, Tensor):
        fits = q.device.type != "cpu" or not ((cache_seqlens < 0) | (cache_seqlens > most)).any()
    elif is_integer(cache_seqlens):
        fits = 0 <= cache_seqlens <= most
    else:
        raise TypeError(
            f"cache_seqlens is {cache_seqlens!r}; it must be an integer, a torch.Tensor, or None"
        )
    if not fits:
        passed = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else cache_seqlens
        keys = f", with {new} new keys" if new else ""
        raise ValueError(f"cache_seqlens is {passed}{keys}; {accepted}")
    if not isinstance(cache_seqlens, Tensor):
        return torch.full(q.shape[:1], cache_seqlens + new, device=q.device)
    return cache_seqlens.to(torch.int64) + new if new else cache_seqlens
