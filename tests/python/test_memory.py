"""What is said of a GPU's memory before the work, against what the work takes, on the CPU."""

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blasst.calibration import calibrate, emulation, memory
from blasst.calibration.memory import (
    Reading,
    Sizes,
    bytes_needed,
    check_fits,
    layers_by_device,
    sizes_of,
)
from blasst.calibration.search import Judge
from blasst.calibration.setup import DECODE_STEPS, Setup, targets_by_phase
from blasst.evaluation import evaluate
from blasst.evaluation.options import Options
from blasst.prompts import DocumentMaker, reference_text
from recency_model import make_recency_model, make_tokenizer
from test_evaluation import configured

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 1024
EIGHT_B = Sizes(32, 4096, 14336, 32, 8, 128, 2048, 128256, 2)


def test_memory_grows_with_prompt_batch_and_chunk():
    at = bytes_needed(EIGHT_B, Reading(131072), 8192)
    assert 17e9 < at < 40e9, "the cache alone is 17 GB"
    assert bytes_needed(EIGHT_B, Reading(131072), None) > at
    assert bytes_needed(EIGHT_B, Reading(131072, 2), 8192) > 1.8 * at
    compared = bytes_needed(EIGHT_B, Reading(131072, compared=1024), 8192) - at
    assert 1.07e9 + 0.5e9 < compared < 2.5e9, "dense hidden states and predictions"


@pytest.mark.parametrize(
    ("chunk", "batch", "message"),
    [
        (
            None,
            1,
            r"a prompt of 1024 tokens in chunks of 1024 need .* cuda:0 has .*: a chunk of 256 ",
        ),
        (128, 2, "2 prompts of 1024 .*: no chunk fits: a smaller batch, or shorter prompts, would"),
    ],
)
@pytest.mark.usefixtures("few_scores")
def test_too_little_memory_is_said_with_the_chunk_that_would_fit(chunk, batch, message):
    sizes, reading = sizes_of(make_recency_model(), 2), Reading(1024, batch)
    free = bytes_needed(sizes, reading, 384 if chunk is None else 128) - 1
    with pytest.raises(ValueError, match=message):
        check_fits(sizes, [Reading(512), reading], chunk, "cuda:0", free)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


@pytest.fixture
def few_scores(monkeypatch):
    """As many are emulated at once as must be, not more than all else of so small a model."""
    for module in (emulation, memory):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 1)


@pytest.fixture
def a_gpu(monkeypatch):
    """Models are on a GPU, as far as memory goes, with so many bytes free."""

    def of(free: int) -> None:
        counted = Counter({torch.device("cuda", 0): 2})
        monkeypatch.setattr(memory, "layers_by_device", lambda *_: counted)
        monkeypatch.setattr(memory, "free_bytes", lambda _: free)

    return of


def calibrating(model, chunk, **more):
    options = {
        "lengths": [LENGTH],
        "target_sparsity": 0.1,
        "prompts": 1,
        "held_out": [],
        "orders": ["reverse"],
        "schemes": ["one_threshold", "least_error"],
    }
    calibrate(model, make_tokenizer(), **options | more, chunk=chunk)


def evaluating(loaded, chunk, out):
    texts = {"first": reference_text()[:4000], "second": reference_text()[9000:13000]}
    evaluate(loaded, Options((0, 0.9), LENGTH, texts, chunk), out=out)


def needed(model, chunk):
    return bytes_needed(sizes_of(model, 2), Reading(LENGTH, compared=LENGTH), chunk)


@pytest.mark.usefixtures("few_scores")
@pytest.mark.parametrize("chunk", [None, 256])
def test_what_is_said_of_a_calibration_is_what_it_takes(chunk, a_gpu):
    model = make_recency_model(LENGTH)
    said = needed(model, chunk)
    a_gpu(said - 1)
    with pytest.raises(ValueError, match=r"cuda:0 has .* GB free"):
        calibrating(model, chunk)
    a_gpu(said)
    with Peak(model) as peak:
        calibrating(model, chunk)
    assert said / 4 < peak.bytes <= said


@pytest.mark.usefixtures("few_scores")
@pytest.mark.parametrize("chunk", [None, 256])
def test_what_is_said_of_an_evaluation_is_what_it_takes(chunk, a_gpu, tmp_path):
    loaded = configured()
    said = needed(loaded.model, chunk)
    a_gpu(said - 1)
    with pytest.raises(ValueError, match=r"cuda:0 has .* GB free"):
        evaluating(loaded, chunk, tmp_path)
    a_gpu(said)
    with Peak(loaded.model) as peak:
        evaluating(loaded, chunk, tmp_path)
    assert said / 4 < peak.bytes <= said


@torch.inference_mode()
def test_candidates_of_prefill_hold_no_other_cache():
    tokens = torch.randint(1, 257, (1, 300), generator=torch.Generator().manual_seed(0))
    maker = DocumentMaker(make_tokenizer(), [tokens], 300)
    targets = targets_by_phase({"decode": 0.1, "prefill": 0.1})
    assert list(targets) == ["prefill", "decode"], "they are tried in this order"
    judge = Judge(
        Setup(make_recency_model(), maker, [300], targets, ["reverse"], ["one_threshold"]), tokens
    )
    assert judge._dense is not None
    assert judge._cache.get_seq_length() == 0
    _, steps = judge._dense_decode
    assert len(steps) == DECODE_STEPS
    assert judge._cache.get_seq_length() == 300


@pytest.mark.usefixtures("few_scores")
def test_the_chunk_that_is_named_is_taken(a_gpu):
    model = make_recency_model(LENGTH)
    a_gpu(needed(model, 384))
    with pytest.raises(ValueError, match="a chunk of 384 tokens fits"):
        calibrating(model, None)
    calibrating(model, 384, target_sparsity={"prefill": 0.1})


@pytest.mark.usefixtures("few_scores")
@pytest.mark.parametrize("asked", [{}, {"held_out": [2 * LENGTH]}])
def test_held_out_prompts_have_to_fit_too(asked, a_gpu):
    model = make_recency_model(2 * LENGTH)
    a_gpu(needed(model, 256))
    with pytest.raises(ValueError, match=f"a held-out prompt of {2 * LENGTH} tokens in chunks"):
        calibrating(model, 256, **{"held_out": None, **asked})


def test_a_model_that_is_split_is_counted_device_by_device():
    model = make_recency_model()
    model.model.layers[1].to("meta")
    assert layers_by_device(model, [0, 1]) == {torch.device("cpu"): 1, torch.device("meta"): 1}
    assert layers_by_device(model, []) == {torch.device("cpu"): 0}
