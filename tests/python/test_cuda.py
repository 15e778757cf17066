"""The operator on a GPU of compute capability 9.0, against the same operator on the CPU."""

import pytest
import torch

import blasst

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def inputs(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int):
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(batch, queries, heads, dim, generator=generator)
    k = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    v = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    return [t.to(torch.bfloat16) for t in (q, k, v)]


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def both(q, k, v, **options):
    cpu = blasst.attention(q.float(), k.float(), v.float(), return_lse=True, **options)
    options = {name: on_gpu(value) for name, value in options.items()}
    gpu = blasst.attention(q.cuda(), k.cuda(), v.cuda(), return_lse=True, **options)
    return cpu, gpu


def assert_close(cpu, gpu) -> None:
    assert gpu.out.dtype == torch.bfloat16
    error = (gpu.out.cpu().float() - cpu.out).norm() / cpu.out.norm()
    assert error < 5e-3
    torch.testing.assert_close(gpu.lse.cpu(), cpu.lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_agrees_with_the_cpu(phase: str, dim: int) -> None:
    q, k, v = inputs(2, 3, 700, 8, 2, dim)
    lengths = torch.tensor([700, 333])
    assert_close(*both(q, k, v, causal=True, lengths=lengths, phase=phase))


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


def test_padding_is_refused() -> None:
    q, k, v = (t.cuda() for t in inputs(2, 1, 128, 4, 2, 64))
    with pytest.raises(RuntimeError, match="cannot be padded"):
        blasst.attention(q, k, v, starts=torch.tensor([0, 3], device="cuda"))
