"""Models whose weights are quantised: calibrated and run as any other, never trained.

Those of bitsandbytes and torchao are tried where these are installed.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import blasst
from blasst.calibration import calibrate
from blasst.hf import models
from blasst.hf.weights import quantisation_of, weights_size
from blasst.measure import agreement
from blasst.measure.results import fingerprint
from blasst.prompts import PromptMaker, reference_text
from blasst.training.finetune import fine_tune
from blasst.training.plan import TrainingPlan
from latent_models import make_latent_model
from recency_model import make_recency_model, make_tokenizer

TARGET = 0.2


class Int8Weights(Tensor):
    """A layer's weights in 8 bits, as torchao has them: for a product, and nothing else."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> "Int8Weights":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def of(cls, weights: Tensor) -> "Int8Weights":
        scales = weights.abs().amax(1, keepdim=True) / 127
        return cls((weights / scales).round().to(torch.int8), scales)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: object) -> "Int8Weights":
        return Int8Weights(**parts)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is functional.linear:
            x, weights, *bias = args
            return functional.linear(x, weights.codes * weights.scales, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(f"{cls.__name__} has no {function}")


def quantised_model() -> LlamaForCausalLM:
    model = make_recency_model()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not model.lm_head:
            layer.weight = nn.Parameter(Int8Weights.of(layer.weight.detach()), requires_grad=False)
    return model


def test_weights_that_only_multiply_are_calibrated_and_reach_the_target(tmp_path):
    model, tokenizer = quantised_model(), make_tokenizer()
    assert is_traceable_wrapper_subclass(model.model.layers[0].self_attn.o_proj.weight)
    calibrate(
        model,
        tokenizer,
        lengths=[512],
        target_sparsity={"prefill": TARGET},
        prompts=1,
        held_out=[],
        schemes=("one_threshold", "least_error"),
        resume=tmp_path / "kept.safetensors",
    )
    assert_skips(model)


def assert_skips(model) -> None:
    """About what was asked, with finite gradients of what the model reads."""
    maker = PromptMaker(make_tokenizer(), reference_text(), "text")
    tokens = maker.make("needle", 512, seed=5).tokens.to(model.device)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with blasst.record() as record:
        model(inputs_embeds=inputs, labels=tokens).loss.backward()
    assert record.sparsity("prefill") == pytest.approx(TARGET, abs=0.1)
    assert inputs.grad.isfinite().all()
    assert inputs.grad.abs().max() > 0


def test_what_is_kept_of_a_quantised_model_is_found_again_and_of_another_is_not():
    model, other = quantised_model(), quantised_model()
    with torch.inference_mode():
        assert fingerprint(model) == fingerprint(other)
        other.model.layers[1].mlp.up_proj.weight.scales[0] *= 2
        assert fingerprint(model) != fingerprint(other)
    assert models.identity(model) == models.identity(make_recency_model())


def test_the_size_of_quantised_weights_is_that_of_what_is_stored():
    model, plain = quantised_model(), make_recency_model()
    layers = [m.weight for m in plain.model.layers.modules() if isinstance(m, nn.Linear)]
    saved = sum(3 * weight.numel() - 4 * len(weight) for weight in layers)
    assert weights_size(model) == weights_size(plain) - saved
    assert weights_size(plain) == sum(4 * weight.numel() for weight in plain.parameters())


def test_latents_are_not_absorbed_by_quantised_weights():
    model = make_latent_model("DeepseekV3")
    projection = model.model.layers[0].self_attn.kv_b_proj
    weights = Int8Weights.of(projection.weight.detach())
    projection.weight = nn.Parameter(weights, requires_grad=False)
    with pytest.raises(blasst.NotSupportedError, match="neither quantised nor adapted"):
        blasst.absorb(model)


def test_predictions_of_a_quantised_output_layer_are_kept_for_its_vocabulary(monkeypatch):
    model, asked = make_recency_model(), []
    packed = nn.Parameter(torch.zeros(257 * 32, 1, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setattr(agreement, "_kept_bytes", lambda *sizes: asked.append(sizes))
    model.lm_head.weight = packed  # as bitsandbytes packs 4 bits
    agreement.DenseRun(model, torch.zeros(100, 64), torch.zeros(100, dtype=torch.long))
    assert asked == [(257, 99)]


def test_quantised_weights_of_a_hub_are_refused_before_the_work_but_for_the_configuration(tmp_path):
    model = quantised_model()
    model.quantization_method, model.config.name_or_path = "torchao", "somebody/model"
    with pytest.raises(ValueError, match=r"quantised by torchao, .* alone \(--config-only\), or"):
        models.check_room(model, tmp_path / "out")
    models.check_room(model, tmp_path / "out", config_only=True)
    (tmp_path / "config.json").touch()
    models.check_room(model, tmp_path)


def bitsandbytes(**options: object) -> Callable[[], object]:
    def make() -> object:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return make


def torchao(name: str, **options: object) -> Callable[[], object]:
    def make() -> object:
        quantisation = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quant_type=getattr(quantisation, name)(**options))

    return make


@pytest.fixture(
    params=[
        bitsandbytes(load_in_8bit=True),
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        torchao("Int8WeightOnlyConfig"),
        torchao("Int8DynamicActivationInt8WeightConfig"),
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
        torchao("Float8WeightOnlyConfig"),
    ],
    ids=["bnb_int8", "bnb_nf4", "int8", "int8_dynamic", "int4", "fp8"],
)
def folder(request, tmp_path):
    """Where a quantised model and its tokenizer are."""
    config = request.param()
    make_recency_model(head_dim=64).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(tmp_path / "quantised")
    make_tokenizer().save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def test_a_model_that_others_have_quantised_is_calibrated_saved_and_loaded(folder, tmp_path):
    loaded = models.load(str(folder))
    assert quantisation_of(loaded.model) in ("bitsandbytes", "torchao")
    calibrate(
        loaded.model,
        loaded.tokenizer,
        lengths=[512],
        target_sparsity=TARGET,
        prompts=1,
        held_out=[],
        schemes=("one_threshold", "least_error"),
        resume=tmp_path / "kept.safetensors",
    )
    models.save_config(loaded.model, loaded.tokenizer, tmp_path / "calibrated")
    assert_skips(models.load(str(tmp_path / "calibrated")).model)


def test_a_quantised_model_is_not_trained(folder, tmp_path):
    with pytest.raises(ValueError, match=r"is quantised by .*, and such weights cannot be trained"):
        fine_tune(str(folder), TrainingPlan(length=256), out=tmp_path / "out")
