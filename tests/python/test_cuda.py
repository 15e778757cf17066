"""The operator on a GPU, against the same operator on the CPU."""

import functools
import math

import pytest
import torch

import blasst
from blasst.methods import bsfa
from blasst.ops.library import prefill_tile
from gpu import HEAD_SIZES, ON_SM90, hopper, needs_gpu, portable
from needle import FP8, INT8, PLACES, check_needle

pytestmark = needs_gpu


def inputs(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int):
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(batch, queries, heads, dim, generator=generator)
    k = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    v = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    return [t.to(torch.bfloat16) for t in (q, k, v)]


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def both(q, k, v, **options):
    wide = [t.float() if t.dtype == torch.bfloat16 else t for t in (q, k, v)]  # but for 8 bits
    cpu = blasst.attention(*wide, return_lse=True, **options)
    options = {name: on_gpu(value) for name, value in options.items()}
    gpu = blasst.attention(q.cuda(), k.cuda(), v.cuda(), return_lse=True, **options)
    return cpu, gpu


def assert_close(cpu, gpu) -> None:
    assert gpu.out.dtype == torch.bfloat16
    error = (gpu.out.cpu().float() - cpu.out).norm() / cpu.out.norm()
    assert error < 5e-3
    torch.testing.assert_close(gpu.lse.cpu(), cpu.lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize(("dim", "value_dim"), HEAD_SIZES)
def test_agrees_with_the_cpu(phase: str, dim: int, value_dim: int) -> None:
    q, k, v = inputs(2, 3, 700, 8, 2, dim)
    v = v[..., :value_dim]
    lengths = torch.tensor([700, 333])
    assert_close(*both(q, k, v, causal=True, lengths=lengths, phase=phase))


@hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_int8_scores(dim: int) -> None:
    q, k, v = (t.cuda() for t in inputs(2, 700, 700, 8, 2, dim))
    run = functools.partial(blasst.attention, q, k, v, causal=True, return_lse=True)
    exact, int8 = (run(scores=scores) for scores in ("exact", "int8"))
    assert not torch.equal(exact.out, int8.out)
    # Of normal numbers the largest of a row or tile is about 4.5: rounding in 1 / 127 of it, in q
    # and in k, gives a score an error of 4.5 / 127 / sqrt(12) * sqrt(2), 0.014 in the mean.
    assert (exact.out - int8.out).float().norm() / exact.out.float().norm() < 2e-2
    torch.testing.assert_close(exact.lse, int8.lse, atol=7e-2, rtol=0)
    # Thresholds mean what they mean with exact scores, but for tiles that lie near them.
    stats = [
        run(scores=scores, threshold=0.3, return_stats=True).stats for scores in ("exact", "int8")
    ]
    assert abs(stats[0].sparsity - stats[1].sparsity) < 0.02


@hopper
@pytest.mark.parametrize(("heads", "positions"), [(16, 1), (128, 2)])
def test_decode_over_latents(heads: int, positions: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, positions, heads, 576, generator=generator).bfloat16()
    latents = torch.randn(2, 700, 1, 576, generator=generator).bfloat16()
    lengths = torch.tensor([700, 333])
    on_device = latents.cuda()
    options = {"causal": True, "phase": "decode", "return_lse": True}
    cpu = blasst.attention(
        q.float(), latents.float(), latents[..., :512].float(), lengths=lengths, **options
    )
    gpu = blasst.attention(
        q.cuda(), on_device, on_device[..., :512], lengths=lengths.cuda(), **options
    )
    assert_close(cpu, gpu)


@hopper
def test_latents_whose_values_lie_elsewhere_are_refused() -> None:
    q, k = torch.zeros(1, 1, 16, 576), torch.zeros(1, 100, 1, 576)
    q, k = (t.to("cuda", torch.bfloat16) for t in (q, k))
    with pytest.raises(blasst.NotSupportedError, match="v is not k's first 512 elements"):
        blasst.attention(q, k, k[..., :512].contiguous(), phase="decode")
    two = k.expand(-1, -1, 2, -1)
    with pytest.raises(blasst.NotSupportedError, match="kv_heads is 2"):
        blasst.attention(q, two, two[..., :512], phase="decode")


@portable
def test_what_the_portable_kernels_lack_is_named() -> None:
    q, k, v = (t.cuda() for t in inputs(1, 100, 100, 4, 2, 128))
    with pytest.raises(blasst.NotSupportedError, match="cuda-sm80: scores is int8"):
        blasst.attention(q, k, v, scores="int8")
    with pytest.raises(blasst.NotSupportedError, match="cuda-sm80: it has no backward"):
        blasst.attention(q.clone().requires_grad_(), k, v).sum().backward()
    with pytest.raises(blasst.NotSupportedError, match="k int8; decode does tensors of one type"):
        small = (torch.zeros_like(t, dtype=torch.int8) for t in (k, v))
        blasst.attention(q[:, :1], *small, k_scale=1.0, v_scale=1.0, phase="decode")
    latents = torch.zeros(1, 100, 1, 576, dtype=q.dtype, device="cuda")
    with pytest.raises(blasst.NotSupportedError, match="cuda-sm80: head_dim is 576"):
        blasst.attention(latents[:, :1], latents, latents[..., :512], phase="decode")


def test_decode_has_exact_scores_only() -> None:
    q, k, v = (t.cuda() for t in inputs(2, 1, 700, 8, 2, 128))
    with pytest.raises(blasst.NotSupportedError, match="scores is int8"):
        blasst.attention(q, k, v, scores="int8")


def test_decode_skips_and_counts() -> None:
    q, k, v = inputs(2, 1, 4096, 8, 2, 128)
    k[:, :64] += q.view(2, 1, 2, 4, 128).mean(3)  # tile 0 is every head's best
    result = blasst.attention(q.cuda(), k.cuda(), v.cuda(), threshold=0.5, return_stats=True)
    assert result.stats.visitable.tolist() == [[64] * 8] * 2
    assert result.stats.skipped.sum().item() > 0


def test_decode_reads_pages() -> None:
    q, k, v = inputs(3, 1, 512, 8, 2, 128)
    lengths = torch.tensor([512, 100, 64])
    order = torch.randperm(3 * 8, generator=torch.Generator().manual_seed(1))
    table = order.argsort().view(3, 8)
    pages = [t.reshape(3 * 8, 64, 2, 128)[order].contiguous() for t in (k, v)]
    dense = blasst.attention(q.cuda(), k.cuda(), v.cuda(), lengths=lengths.cuda())
    paged = blasst.attention(
        q.cuda(),
        pages[0].cuda(),
        pages[1].cuda(),
        lengths=lengths.cuda(),
        page_table=table.cuda(),
    )
    assert torch.equal(dense, paged)


def test_a_graph_sees_new_lengths_and_thresholds() -> None:
    q, k, v = (t.cuda() for t in inputs(2, 1, 4096, 8, 2, 128))
    lengths = torch.tensor([4096, 1000], dtype=torch.int32, device="cuda")
    threshold = torch.full((1, 8), 0.5, device="cuda")

    def run() -> torch.Tensor:
        return blasst.attention(q, k, v, lengths=lengths, threshold=threshold)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for keys, value in (([4096, 1000], 0.5), ([70, 4096], 0.9), ([0, 1], 0.0)):
        lengths.copy_(torch.tensor(keys))
        threshold.fill_(value)
        graph.replay()
        assert torch.equal(out, run())


def ragged(numbers: list[int], q: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Queries of requests that have so many positions, of those in q, and what a call takes."""
    flat = torch.cat([one[:n] for one, n in zip(q, numbers, strict=True)])
    ends = torch.tensor([0, *torch.tensor(numbers).cumsum(0)])
    return flat, {"phase": "decode", "cu_seqlens_q": ends, "max_seqlen_q": q.shape[1]}


@pytest.mark.parametrize(("dim", "value_dim"), HEAD_SIZES)
def test_decode_of_ragged_queries(dim: int, value_dim: int) -> None:
    q, k, v = inputs(4, 5, 700, 8, 2, dim)
    v = v[..., :value_dim]
    lengths = torch.tensor([700, 333, 3, 640])
    flat, options = ragged([2, 5, 0, 1], q)
    assert_close(*both(flat, k, v, causal=True, lengths=lengths, **options))
    q, k, v, flat, lengths = (t.cuda() for t in (q, k, v, flat, lengths))
    options["cu_seqlens_q"] = options["cu_seqlens_q"].cuda()
    options |= {"causal": True, "threshold": 0.3, "return_stats": True, "return_lse": True}
    got = blasst.attention(flat, k, v, lengths=lengths, **options)
    assert got.stats.visitable[2].sum() == 0
    for b, rows in ((0, slice(0, 2)), (1, slice(2, 7)), (3, slice(7, 8))):
        alone, own = ragged([rows.stop - rows.start], q[b : b + 1])
        own["cu_seqlens_q"] = own["cu_seqlens_q"].cuda()
        wanted = blasst.attention(
            alone, k[b : b + 1], v[b : b + 1], lengths=lengths[b : b + 1], **options | own
        )
        assert torch.equal(got.out[rows], wanted.out)
        assert torch.equal(got.lse[:, rows], wanted.lse)
        assert torch.equal(got.stats.skipped[b], wanted.stats.skipped[0])


@hopper
@pytest.mark.parametrize("heads", [16, 96])
def test_decode_of_ragged_queries_over_latents(heads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 2, heads, 576, generator=generator).bfloat16()
    latents = torch.randn(3, 700, 1, 576, generator=generator).bfloat16()
    flat, options = ragged([1, 0, 2], q)
    options |= {"causal": True, "return_lse": True}
    cpu = blasst.attention(flat.float(), latents.float(), latents[..., :512].float(), **options)
    on_device = latents.cuda()
    options = {name: on_gpu(value) for name, value in options.items()}
    assert_close(cpu, blasst.attention(flat.cuda(), on_device, on_device[..., :512], **options))


@hopper
def test_decode_of_ragged_queries_over_quantised_keys() -> None:
    q, k, v = inputs(3, 4, 700, 8, 2, 128)
    keys = blasst.quantize_keys(k)
    v = (v.float() / 0.04).round().clamp(-127, 127).to(torch.int8)
    flat, options = ragged([4, 1, 3], blasst.rotate(q))
    assert_close(*both(flat, keys.k, v, k_scale=keys.scale, v_scale=0.04, causal=True, **options))


def test_a_graph_sees_new_numbers_of_positions() -> None:
    q, k, v = inputs(3, 4, 700, 8, 2, 128)
    flat = q.flatten(0, 1)[:7]
    on_device = [t.cuda() for t in (flat, k, v)]
    ends = torch.tensor([0, 4, 6, 7], dtype=torch.int32, device="cuda")
    options = {"causal": True, "phase": "decode", "max_seqlen_q": 4, "return_lse": True}

    def run() -> blasst.Result:
        return blasst.attention(*on_device, cu_seqlens_q=ends, **options)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for numbers in ([0, 4, 6, 7], [0, 0, 3, 7], [0, 3, 7, 7]):
        ends.copy_(torch.tensor(numbers))
        graph.replay()
        wide = [t.float() for t in (flat, k, v)]
        assert_close(blasst.attention(*wide, cu_seqlens_q=ends.cpu(), **options), result)


@pytest.mark.parametrize("dynamic", [False, True])
def test_ragged_decode_compiled(dynamic: bool) -> None:
    q, k, v = inputs(4, 5, 700, 8, 2, 128)
    k, v = k.cuda(), v.cuda()

    def run(flat: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ragged = {"phase": "decode", "cu_seqlens_q": ends, "max_seqlen_q": 5}
        return 2 * blasst.attention(flat, k, v, causal=True, threshold=0.1, **ragged)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for numbers in ([2, 5, 0, 1], [4, 1, 4, 4]):
        flat, options = ragged(numbers, q)
        given = flat.cuda(), options["cu_seqlens_q"].cuda()
        assert torch.equal(compiled(*given), run(*given))


def test_a_ragged_decode_says_how_many_positions_a_request_may_have() -> None:
    q, k, v = (t.cuda() for t in inputs(2, 5, 100, 8, 2, 128))
    flat, options = ragged([5, 1], q)
    options["cu_seqlens_q"] = options["cu_seqlens_q"].cuda()
    with pytest.raises(ValueError, match="given without max_seqlen_q; a decode on cuda needs"):
        blasst.attention(flat, k, v, **options | {"max_seqlen_q": None})
    with pytest.raises(ValueError, match="query_length is 17; it must be 1 to 16"):
        blasst.attention(flat, k, v, **options | {"max_seqlen_q": 17})
    with pytest.raises(NotImplementedError, match="8 query heads for each KV head at 16 positions"):
        wide = flat.repeat(1, 2, 1)
        blasst.attention(wide, k, v, **options | {"max_seqlen_q": 16})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prefill_agrees_with_the_cpu(side: str) -> None:
    q, k, v = inputs(3, 200, 200, 8, 2, 64)
    used = torch.tensor([200, 7, 130])
    options = {"starts": 200 - used} if side == "left" else {"lengths": used, "query_lengths": used}
    cpu, gpu = both(q, k, v, causal=True, threshold=0.01, **options)
    assert_close(cpu, gpu)
    assert torch.equal(gpu.out.cpu() == 0, cpu.out == 0)


def test_padded_decode_agrees_with_the_cpu() -> None:
    q, k, v = inputs(3, 1, 700, 8, 2, 128)
    options = {
        "starts": torch.tensor([0, 650, 3]),
        "lengths": torch.tensor([700, 660, 600]),
        "query_lengths": torch.tensor([1, 1, 0]),
    }
    cpu, gpu = both(q, k, v, causal=True, **options)
    assert_close(cpu, gpu)
    assert not gpu.out[2].any()
    q, k, v = (t.cuda() for t in inputs(1, 2, 100, 4, 2, 64))
    with pytest.raises(NotImplementedError, match="a decode of 2 positions"):
        blasst.attention(q, k, v, phase="decode", query_lengths=torch.tensor([2]).cuda())


def test_merge_of_two_calls_is_one_call() -> None:
    q, k, v = inputs(2, 300, 900, 8, 2, 128)
    whole = blasst.attention(q.float(), k.float(), v.float(), causal=True, return_lse=True)
    q, k, v = (t.cuda() for t in (q, k, v))
    before = blasst.attention(q, k[:, :600], v[:, :600], return_lse=True)
    own = blasst.attention(q, k[:, 600:], v[:, 600:], causal=True, return_lse=True)
    out, lse = blasst.merge(before.out, before.lse, own.out, own.lse)
    assert_close(whole, own._replace(out=out, lse=lse))


def test_pages_are_checked_where_that_is_asked_for() -> None:
    q, k, v = (t.cuda() for t in inputs(2, 1, 512, 8, 2, 128))
    k, v = (t.reshape(16, 64, 2, 128) for t in (k, v))
    for phase in ("decode", "prefill"):
        table = torch.arange(16, device="cuda").view(2, 8)
        lengths = torch.tensor([512, 100], device="cuda")
        paged = {"phase": phase, "page_table": table, "lengths": lengths}
        good = blasst.attention(q, k, v, check_pages=True, **paged)
        table[1, 1] = 16
        with pytest.raises(ValueError, match=r"page_table\[1, 1\] is 16; it must be 0 to 15"):
            blasst.attention(q, k, v, check_pages=True, **paged)
        assert blasst.attention(q, k, v, **paged).isfinite().all()
        table[1, 1] = 9
        lengths[0] = 513
        with pytest.raises(ValueError, match=r"lengths\[0\] is 513; it must be 0 to 512"):
            blasst.attention(q, k, v, check_pages=True, **paged)
        assert torch.equal(blasst.attention(q, k, v, **paged), good), "cut to the table's room"
    with pytest.raises(ValueError, match="needs page_table"):
        blasst.attention(q, k[:2], v[:2], check_pages=True)


def test_most_tokens_of_a_request_change_nothing() -> None:
    q, k, v = (t.cuda() for t in inputs(1, 450, 450, 8, 2, 128))
    flat = [t[0] for t in (q, k, v)]
    cu = torch.tensor([0, 300, 300, 370, 450], device="cuda")
    options = {"causal": True, "threshold": 0.1, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    wanted = blasst.attention(*flat, **options)
    for most in (300, 1000):
        got = blasst.attention(*flat, max_seqlen_q=most, max_seqlen_k=most, **options)
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="rows is 450, more than batch 4 times query_length 80"):
        blasst.attention(*flat, max_seqlen_q=80, **options)
    pages = [t.flatten(0, 1)[:448].view(7, 64, 2, 128) for t in (k, v)]
    paged = {
        "page_table": torch.arange(7, device="cuda")[None],
        "lengths": torch.tensor([200], device="cuda"),
    }
    for queries in (q[:, :1], q):
        wanted = blasst.attention(queries, *pages, **paged)
        for most in (200, 10_000):
            got = blasst.attention(queries, *pages, max_seqlen_k=most, **paged)
            torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


def test_idle_decode_rows_have_no_lse() -> None:
    q, k, v = (t.cuda() for t in inputs(2, 1, 100, 4, 2, 64))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda")
    options = {"sinks": sinks, "return_lse": True}
    used = torch.tensor([1, 0], device="cuda")
    lse = blasst.attention(q, k, v, query_lengths=used, **options).lse
    assert lse[0].isfinite().all()
    assert (lse[1] == -torch.inf).all()
    none = torch.tensor([100, 0], device="cuda")
    lse = blasst.attention(q, k, v, lengths=none, **options).lse
    assert torch.equal(lse[1, :, 0], sinks)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_nothing_to_do(phase: str) -> None:
    queries = 1 if phase == "decode" else 5
    for batch, keys in ((0, 64), (2, 0)):
        q, k, v = (t.cuda() for t in inputs(batch, queries, keys, 4, 2, 64))
        result = blasst.attention(q, k, v, phase=phase, return_lse=True)
        assert result.out.shape == q.shape
        assert not result.out.any()
        assert torch.equal(result.lse, torch.full_like(result.lse, -torch.inf))
    q, k, v = (t.flatten(0, 1).cuda() for t in inputs(0, queries, 0, 4, 2, 64))
    none = torch.zeros(3, dtype=torch.int32, device="cuda")
    assert blasst.attention(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none).shape == q.shape


def test_wrong_tensors_are_errors() -> None:
    q, k, v = (t.cuda() for t in inputs(1, 4, 64, 4, 2, 64))
    with pytest.raises(ValueError, match="v is on cpu, q on cuda:0"):
        blasst.attention(q, k, v.cpu())
    with pytest.raises(ValueError, match="lengths is on cpu, q on cuda:0"):
        blasst.attention(q, k, v, lengths=torch.tensor([3]))
    odd = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view(k.shape)
    with pytest.raises(NotImplementedError, match=r"k\.data is .*; it must be 16-byte aligned"):
        blasst.attention(q, odd, v)
    with pytest.raises(NotImplementedError, match="float32; it does bfloat16 and float16"):
        blasst.attention(q.float(), k.float(), v.float())


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_over_4_gib(paged: bool) -> None:
    batch, keys = 3, 1 << 20
    k, v = (torch.empty(batch, keys, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    assert k.nbytes > 4 << 30
    for t in (k, v):
        t[-1].normal_()
    q = torch.randn(batch, 1, 32, 128, device="cuda").bfloat16()
    small = [t[-1:, -3000:].clone() for t in (k, v)]
    if paged:
        k, v = (t.view(-1, 64, 8, 128) for t in (k, v))
        pages = torch.arange(47, device="cuda").flip(0)
        table = k.shape[0] - 1 - pages[None]
        lengths = torch.tensor([47 * 64], device="cuda")
        small = [t[-47:].reshape(1, -1, 8, 128).clone() for t in (k, v)]
        for queries in (q[:1], q[:1].expand(1, 70, 32, 128).contiguous()):
            got = blasst.attention(queries, k, v, page_table=table, lengths=lengths)
            assert torch.equal(got, blasst.attention(queries, *small))
        return
    starts = torch.tensor([0, 0, keys - 3000], device="cuda")
    lengths = torch.tensor([0, 0, keys], device="cuda")
    for queries in (q, q.expand(batch, 1, 32, 128).repeat(1, 70, 1, 1)):
        got = blasst.attention(queries, k, v, starts=starts, lengths=lengths)
        assert torch.equal(got[-1:], blasst.attention(queries[-1:], *small))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_memory_is_for_outputs_and_a_workspace_that_goes_back(phase: str) -> None:
    queries = 1 if phase == "decode" else 300
    q, k, v = (t.cuda() for t in inputs(4, queries, 2000, 8, 2, 128))
    threshold = torch.full((1, 8), 0.1, device="cuda")

    def run() -> blasst.Result:
        return blasst.attention(
            q, k, v, threshold=threshold, phase=phase, return_lse=True, return_stats=True
        )

    run()
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    before = torch.cuda.memory_allocated()
    result = run()
    kept = torch.cuda.memory_allocated() - before
    tensors = (result.out, result.lse, torch.empty(2 * 4 * 8, dtype=torch.int64))
    assert kept == sum(-(-t.nbytes // 512) * 512 for t in tensors)
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_workspace_of_the_callers(phase: str) -> None:
    queries = 2 if phase == "decode" else 300
    q, k, v = (t.cuda() for t in inputs(4, queries, 5000, 8, 2, 128))
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "keys": 5000, "query_length": queries}
    needed = [
        blasst.workspace_bytes(phase, "cuda", q.dtype, batch=batch, **shape) for batch in (4, 6)
    ]
    assert 0 < needed[0] <= needed[1]
    workspace, out = torch.empty(needed[1], dtype=torch.uint8, device="cuda"), torch.empty_like(q)
    threshold = torch.full((1, 8, 1), 0.1, device="cuda")

    def run(workspace: torch.Tensor) -> torch.Tensor:
        options = {"causal": True, "threshold": threshold, "phase": phase}
        return blasst.attention(q, k, v, out=out, workspace=workspace, **options)

    run(workspace)
    wanted = blasst.attention(q, k, v, causal=True, threshold=threshold, phase=phase)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert run(workspace) is out
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(out, wanted)
    with pytest.raises(ValueError, match=rf"of at least {needed[0]} for this call"):
        run(workspace[: needed[0] - 1])


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_compiled_and_captured(phase: str) -> None:
    queries = 1 if phase == "decode" else 100
    q, k, v = (t.cuda() for t in inputs(2, queries, 700, 8, 2, 128))

    def run(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return 2 * blasst.attention(q, k, v, causal=True, lengths=lengths, threshold=0.1)

    compiled = torch.compile(run, mode="reduce-overhead", fullgraph=True)
    for keys in ([700, 300], [200, 650], [700, 1]):
        lengths = torch.tensor(keys, device="cuda")
        for _ in range(3):  # warms up, captures, replays
            assert torch.equal(compiled(q, lengths), run(q, lengths))


@pytest.mark.parametrize("dim", [64, 256])
def test_tile_maxima_and_thresholds_by_place(dim: int) -> None:
    q, k, v = (t.cuda() for t in inputs(1, 700, 700, 4, 2, dim))
    rows, keys = prefill_tile(q.device, dim)
    assert blasst.tile_shape(q, k, v, phase="prefill")[:2] == (rows, keys)
    maxima = blasst.attention(q, k, v, causal=True, return_tile_maxima=True).tile_maxima
    scores = (
        torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(2, 2)) / dim**0.5
    )
    seen = torch.ones(700, 700, device="cuda").tril().bool()
    scores = scores.masked_fill(~seen, -math.inf)
    pad = (0, -700 % keys, 0, -700 % rows)
    tiles = torch.nn.functional.pad(scores, pad, value=-math.inf)
    wanted = tiles.unflatten(-1, (-1, keys)).unflatten(2, (-1, rows)).amax((3, 5))
    torch.testing.assert_close(maxima, wanted, atol=1e-3, rtol=1e-3)

    thresholds = bsfa.thresholds_of(maxima[0], (2,))[0]
    result = blasst.attention(
        *(q, k, v),
        causal=True,
        absolute_threshold=thresholds.float()[None],
        order="reverse",
        return_stats=True,
        return_lse=True,
    )
    kept = wanted[0] >= thresholds[..., None]
    row = torch.arange(700, device="cuda")
    kept[:, row // rows, row // keys] = True  # a row's last tile, which it visits first
    kept &= wanted[0] > -math.inf
    assert torch.equal(result.stats.skipped[0], ((wanted[0] > -math.inf) & ~kept).sum((1, 2)))
    mask = kept.repeat_interleave(rows, 1).repeat_interleave(keys, 2)[:, :700, :700]
    lse = scores[0].masked_fill(~mask, -math.inf).logsumexp(-1)
    torch.testing.assert_close(result.lse[0], lse, atol=1e-3, rtol=1e-3)


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def on_devices(phase: str, layout: str) -> list[dict]:
    """The arguments of a call, on the current device, the first, and on the second."""
    q, k, v = inputs(3, 1 if phase == "decode" else 200, 512, 8, 2, 128)
    given = {"q": q, "k": k, "v": v, "lengths": torch.tensor([512, 100, 64])}
    if layout == "paged":
        given |= {name: given[name].reshape(24, 64, 2, 128) for name in "kv"}
        given["page_table"] = torch.arange(24).view(3, 8)
    elif layout == "ragged":
        ends = torch.tensor([0, 100, 130, 512])
        q = q.flatten(0, 1)[: int(ends[-1])]
        given = {"q": q, "k": k[0], "v": v[0], "cu_seqlens_q": ends, "cu_seqlens_k": ends}
    given |= {"threshold": torch.full((1, 8), 0.9), "sinks": torch.linspace(-1, 1, 8)}
    return [{name: t.to(device) for name, t in given.items()} for device in ("cuda:0", "cuda:1")]


@needs_two_gpus
@pytest.mark.parametrize(
    ("layout", "phase"),
    [(layout, phase) for layout in ("dense", "paged") for phase in ("prefill", "decode")]
    + [("ragged", "prefill")],
)
def test_tensors_of_a_second_device(layout: str, phase: str) -> None:
    first, second = on_devices(phase, layout)
    options = {"causal": True, "phase": phase, "check_pages": layout == "paged"}
    options |= {"return_lse": True, "return_stats": True}
    wanted = blasst.attention(**first, **options)
    before = torch.cuda.memory_allocated(0)
    got = blasst.attention(**second, **options)
    assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_allocated(0) == before, "workspace and results are the second's"
    pairs = ((got.out, wanted.out), (got.lse, wanted.lse))
    for mine, other in (*pairs, *zip(got.stats, wanted.stats, strict=True)):
        assert mine.device == torch.device("cuda:1")
        assert torch.equal(mine.cpu(), other.cpu())
    merged = [blasst.merge(r.out, r.lse, r.out, r.lse)[0].cpu() for r in (got, wanted)]
    assert torch.equal(*merged)
    name = "k" if phase == "decode" else "lengths" if "lengths" in first else "cu_seqlens_k"
    with pytest.raises(ValueError, match=f"{name} is on cuda:0, q on cuda:1"):
        blasst.attention(**{**second, name: first[name]}, phase=phase)


@needs_two_gpus
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_streams_and_graphs_of_a_second_device(phase: str) -> None:
    first, second = on_devices(phase, "paged")

    def run(given: dict) -> torch.Tensor:
        return blasst.attention(**given, causal=True, phase=phase)

    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        got = run(second)
    stream.synchronize()
    assert torch.equal(got.cpu(), run(first).cpu())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run(second)
    assert torch.cuda.current_device() == 0
    for keys, value in (([512, 100, 64], 0.9), ([1, 300, 0], 0.5)):
        for given in (first, second):
            given["lengths"].copy_(torch.tensor(keys))
            given["threshold"].fill_(value)
        torch.cuda.synchronize(1)
        graph.replay()
        torch.cuda.synchronize(1)
        assert torch.equal(out.cpu(), run(first).cpu())


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("pair", [("int8", "int8"), ("fp8", "fp8"), ("int8", None), (None, "fp8")])
def test_prefill_over_caches_in_8_bits_is_that_over_the_rounded_numbers(dim: int, pair) -> None:
    q, *kv = (t.cuda() for t in inputs(2, 300, 700, 8, 2, dim))
    scales = torch.tensor([[0.031, 0.017], [0.023, 0.05]], device="cuda")
    small, given, numbers = [], {}, []
    for name, kind, t in zip(("k_scale", "v_scale"), pair, kv, strict=True):
        if kind is None:
            small.append(t)
            numbers.append(t)
            continue
        units = t.float() / scales[:, None, :, None]
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        small.append(
            units.round().clamp(-127, 127).to(dtype) if kind == "int8" else units.to(dtype)
        )
        given[name] = scales
        numbers.append((small[-1].float() * scales[:, None, :, None]).to(q.dtype))
    options = {"causal": True, "phase": "prefill", "threshold": 0.1}
    calls = [{}, {"lengths": torch.tensor([650, 300], device="cuda")}]
    if ON_SM90 and pair[0] != "int8":  # whose bytes are taken as they are
        calls.append({"scores": "int8"})
    for more in calls:
        got = blasst.attention(q, *small, **given, **options, **more)
        assert torch.equal(got, blasst.attention(q, *numbers, **options, **more))
    table = torch.randperm(22, device="cuda").reshape(2, 11)
    lengths = torch.tensor([700, 690], device="cuda")
    pages = [in_pages(t, table) for t in small]
    got = blasst.attention(q, *pages, **given, **options, page_table=table, lengths=lengths)
    assert torch.equal(got, blasst.attention(q, *numbers, **options, lengths=lengths))


def in_pages(t: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[2, 700, ..] in 22 pages of 64 tokens."""
    bits = torch.uint8 if t.element_size() == 1 else t.dtype
    room = torch.zeros(2, 704, *t.shape[2:], dtype=bits, device="cuda")
    room[:, :700] = t.view(bits)
    paged = torch.empty(22, 64, *t.shape[2:], dtype=bits, device="cuda")
    paged[table.flatten()] = room.unflatten(1, (11, 64)).flatten(0, 1)
    return paged.view(t.dtype)


@hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kinds", [1, 2])
def test_int8_scores_take_int8_keys_as_they_are(dim: int, kinds: int) -> None:
    """So they do not depend on tiles, and the CPU has the same."""
    q, k, v = inputs(2, 300, 700, 8, 2, dim)
    keys, q = blasst.quantize_keys(k), blasst.rotate(q)
    options = {"k_scale": keys.scale, "causal": True, "phase": "prefill", "scores": "int8"}
    if kinds == 2:
        options["v_scale"] = 0.04
        v = (v.float() / 0.04).round().clamp(-127, 127).to(torch.int8)
    for more in ({}, {"softcap": 3.0, "sinks": torch.randn(8)}):
        assert_close(*both(q, keys.k, v, **options, **more))
    options |= {
        "k_scale": keys.scale.cuda(),
        "threshold": 0.1,
        "lengths": torch.tensor([700, 690]).cuda(),
    }
    q, *small = (t.cuda() for t in (q, keys.k, v))
    table = torch.randperm(22, device="cuda").reshape(2, 11)
    pages = [in_pages(t, table) for t in small]
    got = blasst.attention(q, *pages, **options, page_table=table)
    assert torch.equal(got, blasst.attention(q, *small, **options))


@hopper
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize(("dim", "kinds"), [(64, 2), (128, 2), (128, 1), (256, 2)])
def test_decode_over_quantised_keys(dim: int, kinds: int, positions: int) -> None:
    q, k, v = inputs(2, positions, 700, 8, 2, dim)
    keys = blasst.quantize_keys(k)
    options = {"k_scale": keys.scale, "causal": True, "phase": "decode"}
    if kinds == 2:
        options["v_scale"] = 0.04
        v = (v.float() / 0.04).round().clamp(-127, 127).to(torch.int8)
    assert_close(*both(blasst.rotate(q), keys.k, v, **options))


@hopper
@pytest.mark.parametrize("pair", [(FP8, FP8), (INT8, INT8), (INT8, None), (None, None)], ids=str)
@pytest.mark.parametrize("at", PLACES)
def test_a_needle_among_128k_keys_is_found(pair, at) -> None:
    check_needle(pair, 128, at, close=5e-3, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_workspace_may_hold_anything(phase: str) -> None:
    """Before each call, and before each run of a captured graph: other work uses it meanwhile."""
    queries = 1 if phase == "decode" else 300
    q, k, v = (t.cuda() for t in inputs(48, queries, 2000, 32, 8, 128))
    options = {"causal": True, "phase": phase, "threshold": 0.01}
    expected = blasst.attention(q, k, v, **options)
    room = {"batch": 48, "query_length": queries, "keys": 2000}
    needed = blasst.workspace_bytes(
        phase, "cuda", q.dtype, heads=32, kv_heads=8, head_dim=128, **room
    )
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(expected)

    def run() -> None:
        blasst.attention(q, k, v, out=out, workspace=workspace, **options)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for byte in (0, 255, 1, 255, None):
        for again in (run, graph.replay, graph.replay):
            if byte is None:
                workspace.random_()
            else:
                workspace.fill_(byte)
            out.fill_(math.nan)
            again()
            assert torch.equal(out, expected)
