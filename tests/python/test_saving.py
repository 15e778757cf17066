"""A calibration beside config.json: what is written there, found again, and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import blasst
from blasst.config import Law, Measured, SparseAttention, ThresholdTable, parse
from blasst.config.tables import TABLES_FILE
from blasst.hf.models import save_config
from blasst.hf.saving import calibration_in
from recency_model import make_tokenizer
from tiny_models import VOCABULARY, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

MOST = 4096
"""Bytes that config.json may grow by."""


def calibration(layers: int, heads: int, ignored: int = 0) -> SparseAttention:
    """Of two phases, prefill on two tile shapes and with a stand-in."""
    targets, lengths = tuple(i / 20 for i in range(1, 19)), (1024, 2048, 4096, 8192)

    def table(seed: int) -> ThresholdTable:
        generator = torch.Generator().manual_seed(seed)
        shape = len(lengths), len(targets), layers, heads
        ln = -8 * torch.rand(shape, generator=generator)
        return ThresholdTable("reverse", "equal_mass", Law(3, 5, 1.5), lengths, targets, ln)

    first = ThresholdTable(
        **{**vars(table(0)), "below": (2048,) * len(targets), "shorter": table(1)}
    )
    prefill = Measured(
        (64, 64), (first,), law=Law(1, 2), others=(Measured((64, 128), (table(2),)),)
    )
    names = [f"model.language_model.layers.{i}.self_attn" for i in range(ignored)]
    return SparseAttention(
        ("LlamaAttention",),
        {"prefill": Law(7.93, 8.61), "decode": Law(0.12, 9.85)},
        {"prefill": 0.5, "decode": 0.5},
        tuple(names),
        {"prefill": prefill, "decode": Measured((2, 64), (table(3),))},
    )


@pytest.fixture
def saved(tmp_path):
    model = make_model("llama", sparse_attention_config=calibration(2, 4).to_dict())
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_config_json_grows_by_little_whatever_the_model(tmp_path):
    config = LlamaConfig(num_hidden_layers=2)
    config.save_pretrained(tmp_path / "before")
    config.sparse_attention_config = calibration(62, 64, ignored=52).to_dict()
    config.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / name / "config.json").stat().st_size for name in ("before", "after")]
    assert sizes[1] - sizes[0] <= MOST
    tables = load_file(tmp_path / "after" / TABLES_FILE)
    assert {tuple(t.shape) for t in tables.values()} == {(4, 18, 62, 64)}


@torch.no_grad()
def test_a_saved_model_has_the_same_thresholds_when_it_is_loaded(saved, tmp_path):
    model, folder = saved
    assert "ln_threshold" not in (folder / "config.json").read_text()
    assert "policies" in model.config.sparse_attention_config["blasst"]["prefill"], "as before"
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="blasst").eval()
    assert calibration_in(loaded).to_dict() == parse(model.config.sparse_attention_config).to_dict()
    ids = torch.randint(3, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with blasst.set_target(loaded, prefill=0.7), blasst.set_target(model, prefill=0.7):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", TABLES_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_that_holds_the_model_gets_its_configuration_and_tables_alone(saved):
    model, folder = saved
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    model.config.sparse_attention_config = calibration(2, 4).with_targets(prefill=0.75).to_dict()
    save_config(model, make_tokenizer(), folder)
    entry = json.loads((folder / "config.json").read_text())["sparse_attention_config"]
    assert entry["config_groups"]["group_0"]["target_sparsity"]["prefill"] == 0.75
    assert set(entry["blasst"]) == {"version", "tables"}
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights


def first_pass(folder) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="blasst")
    model(torch.ones(1, 4, dtype=torch.int64))


def test_tables_that_are_missing_or_anothers_are_an_error_that_names_them(saved, tmp_path):
    _, folder = saved
    other = make_model("llama", sparse_attention_config=calibration(2, 4, 1).to_dict())
    other.config.sparse_attention_config["blasst"]["decode"]["policies"][0]["heads"] = "least_error"
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / TABLES_FILE, folder)
    with pytest.raises(ValueError, match=f"{TABLES_FILE} holds the tables of another calibration"):
        first_pass(folder)
    (folder / TABLES_FILE).unlink()
    with pytest.raises(ValueError, match=f"tables in {TABLES_FILE} .*it is missing there: copy it"):
        first_pass(folder)


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [
        (2, 3, "thresholds for 3 heads of layer 0; the model has 4: it is another model's"),
        (3, 4, "thresholds for 3 layers; the model has 2"),
    ],
)
def test_a_calibration_of_another_model_is_an_error(layers, heads, message):
    model = make_model("llama", sparse_attention_config=calibration(layers, heads).to_dict())
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 4, dtype=torch.int64))


@torch.no_grad()
def test_a_calibration_stays_anothers_after_its_own_model_ran():
    entry, tokens = calibration(3, 4).to_dict(), torch.ones(1, 4, dtype=torch.int64)
    whole, smaller = make_model("llama", num_hidden_layers=3), make_model("llama")
    whole.config.sparse_attention_config = smaller.config.sparse_attention_config = entry
    whole(tokens)
    with pytest.raises(ValueError, match="thresholds for 3 layers; the model has 2"):
        smaller(tokens)


def test_tables_of_a_configuration_from_nowhere_are_an_error(saved):
    entry = json.loads((saved[1] / "config.json").read_text())["sparse_attention_config"]
    with pytest.raises(ValueError, match="has its tables in blasst_thresholds"):
        parse(entry)
    model = make_model("llama", sparse_attention_config=entry)
    with pytest.raises(ValueError, match="this configuration was not loaded from a folder"):
        model(torch.ones(1, 4, dtype=torch.int64))


def test_what_is_not_calibrated_is_saved_as_ever(tmp_path):
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
