"""Reading with a cache, under whatever name this version of Transformers gives it."""

import pytest
import torch
from transformers import DynamicCache, LlamaModel

from blasst import versions
from blasst.hf.reading import check_chunk, read
from recency_model import make_recency_model


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_the_cache_takes_up_what_is_read_and_the_next_tokens_see_it():
    model = make_recency_model()
    whole, cache = tokens(90), DynamicCache(config=model.config)
    parts = [read(model, whole[:, part], cache) for part in (slice(0, 64), slice(64, 90))]
    assert cache.get_seq_length() == 90
    torch.testing.assert_close(torch.cat(parts, 1), read(model, whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(parts[1], read(model, whole[:, 64:]), atol=1e-2)


@torch.inference_mode()
def test_chunks_read_the_same_with_a_cache_and_without():
    model, whole = make_recency_model(), tokens(300)
    expected = read(model, whole)
    cache = DynamicCache(config=model.config)
    for hidden in (read(model, whole, chunk=128), read(model, whole, cache, 128)):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 300


@pytest.mark.parametrize("chunk", [0, 64, 200])
def test_a_chunk_that_cuts_tiles_is_an_error(chunk):
    with pytest.raises(ValueError, match=f"chunk is {chunk}; it must be a multiple of 128"):
        check_chunk(chunk)


def test_the_name_is_read_from_the_signature():
    class Newer:
        def forward(self, input_ids, cache=None, **kwargs): ...

    class Older:
        def forward(self, input_ids, past_key_values=None, **kwargs): ...

    class Encoder:
        def forward(self, input_ids, **kwargs): ...

    assert versions.cache_name(Newer) == "cache"
    assert versions.cache_name(Older) == "past_key_values"
    assert versions.cache_name(LlamaModel) in versions.CACHE_NAMES
    with pytest.raises(ValueError, match=r"Encoder.forward takes no cache"):
        versions.cache_name(Encoder)


def test_an_older_version_is_an_error_that_names_both(monkeypatch):
    versions.check_version()
    for found in ("4.57.3", "5.5.4"):
        monkeypatch.setattr(versions, "version", lambda _, found=found: found)
        with pytest.raises(ImportError, match=rf"transformers {found} is installed.* needs 5\.6"):
            versions.check_version()
