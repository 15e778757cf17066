"""Evaluation of a small random model, its report, and going on after a stop."""

import json
import math
import re
from base64 import b64decode

import numpy as np
import pytest
import torch

import blasst
from blasst.cli.app import main
from blasst.config import Law, Measured, SparseAttention, ThresholdTable
from blasst.evaluation import (
    Options,
    evaluate,
    lm_eval,
    parts_of,
    prompted,
    report,
    runner,
    shorter_lengths,
    texts,
    timing,
)
from blasst.evaluation.answers import answer
from blasst.evaluation.kept_tiles import (
    SIZE,
    AtThresholds,
    KeptByThreshold,
    KeptTiles,
    cells_of,
)
from blasst.evaluation.settings import DENSELY, Scheme
from blasst.evaluation.summary import rows, timings
from blasst.hf import dense_on_purpose, recording_with
from blasst.hf.models import Loaded
from blasst.hf.operator import KERNELS, calling, current
from blasst.hf.reading import read
from blasst.measure.agreement import DenseRun
from blasst.measure.results import Results
from blasst.prompts import PromptMaker, reference_text
from recency_model import make_loaded, make_tokenizer

LENGTH = 800
TEXTS = {"first": reference_text()[:4000], "second": reference_text()[9000:13000]}


def configured() -> Loaded:
    """With thresholds that skip something, as a calibration would leave them."""
    loaded = make_loaded()
    ln = torch.tensor([-4.0, 0.0]).reshape(1, 2, 1, 1)
    policy = ThresholdTable(
        "reverse", "one_threshold", Law(9.0, 2.0, 1.5), (LENGTH,), (0.1, 0.9), ln
    )
    config = SparseAttention(
        targets=("LlamaAttention",),
        laws={"prefill": Law(400.0, 0.3)},
        target_sparsity={"prefill": 0.5},
        measured={"prefill": Measured((64, 64), (policy,))},
    )
    loaded.model.config.sparse_attention_config = config.to_dict()
    return loaded


def run(out, **options) -> Results:
    defaults = {"targets": (0, 0.9), "length": LENGTH, "texts": TEXTS}
    return evaluate(configured(), Options(**{**defaults, **options}), out=out)


MEASURED = {
    "needles": 2,
    "needle_lengths": (400, LENGTH),
    "timed_lengths": (400, LENGTH),
    "repeats": 2,
    "paper_targets": (0.9,),
    "other_lengths": (300, 600),
    "length_prompts": 2,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def results(out) -> Results:
    return run(out, **MEASURED)


def test_dense_agrees_with_itself_and_sparse_is_compared_with_it(results):
    dense, sparse, paper = rows(results)
    assert dense.setting == DENSELY
    assert dense.top1 == (1.0, 0.0)
    assert dense.kl[0] == pytest.approx(0, abs=1e-9)
    assert dense.sparsity[0] == 0
    assert (sparse.setting.scheme, paper.setting.scheme) == (Scheme.CALIBRATED, Scheme.PAPER)
    assert sparse.sparsity[0] > 0
    assert sparse.kl[0] > 0
    assert sparse.texts == len(TEXTS)


def test_texts_that_are_read_in_chunks_have_the_same_perplexity(results, tmp_path):
    found = run(tmp_path, chunk=256, needles=2)
    assert rows(found)[1].sparsity[0] > 0
    for (name, scheme, _), value in found.all("text"):
        expected = results.get("text", name, scheme, 0.0)
        if scheme == Scheme.DENSE:
            assert value["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    key = ("needle", LENGTH, 0.25, Scheme.DENSE, 0.0)
    assert found.get(*key)["answer"] == results.get(*key)["answer"]


def test_sparse_texts_have_bounds_of_their_rows(results, out):
    for (name, scheme, _), value in results.all("text"):
        assert ("bound" in value) == (scheme != Scheme.DENSE)
        if scheme != Scheme.DENSE:
            below = [*value["bound"]["below"].values()]
            assert 0 < below[0] <= below[1] <= below[2] <= 1
            largest = [one["bound"] for one in value["bound"]["worst"]]
            assert largest == sorted(largest, reverse=True)
            last = value["bound"]["worst"][0]
            assert TEXTS[name].encode()[: last["token"] + 1].endswith(last["text"].encode())
    by_title = {t.title: t for t in report.tables(results, None)}
    shares = by_title["Bound on the mass that rows dropped"]
    assert [row[0] for row in shares.rows] == ["calibrated, 90%", f"{Scheme.PAPER}, 90%"]
    assert len(by_title["Tokens with the largest bound"].rows) == 2 * len(TEXTS) * 5


def test_every_prompt_was_answered_in_every_setting(results):
    assert {key for key, _ in results.all("needle")} == {
        (length, depth, scheme, target)
        for length in (400, LENGTH)
        for depth in (0.25, 0.75)
        for scheme, target in ((Scheme.DENSE, 0.0), (Scheme.CALIBRATED, 0.9))
    }


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.75, 1.0])
def test_a_fact_stands_as_deep_as_it_should(depth):
    maker = PromptMaker(make_tokenizer(), reference_text(), "text")
    prompt = maker.make("needle", 4000, 3, depth)
    read = make_tokenizer().decode(prompt.tokens[0])
    place = read.index(f'is "{prompt.answers[0]}"') / len(read)
    assert place == pytest.approx(min(depth, 0.9), abs=0.08)


def test_every_setting_is_timed_by_length_warm_and_repeated(results):
    found = timings(results)
    assert {(t.length, t.setting.name) for t in found} == {
        (length, name)
        for length in (400, LENGTH)
        for name in ("torch sdpa", "dense", "calibrated, 90%")
    }
    for time in found:
        assert len(time.seconds) == 2
        assert (time.attention is None) == (time.setting.name == "torch sdpa")
        assert (time.sparsity > 0) == (time.setting.target > 0)
        if time.setting.target:
            dense = time.dense
            assert time.predicted == dense.median - dense.attention + time.attention


def test_the_time_of_attention_alone_is_that_of_the_faster_of_two_later_calls(monkeypatch):
    """The first call of a kind can take far longer than those that follow."""
    calls, clock = [], [0.0]

    class Counted:
        tile_of = KERNELS.tile_of

        @staticmethod
        def attention(*inputs, **options):
            clock[0] += [7.0, 3.0, 2.0][len(calls)]
            calls.append(options)

    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    with calling(Counted()):
        alone = timing.Alone(torch.device("cpu"))
    alone.attention(torch.zeros(1), return_stats=True)
    assert alone.seconds == 2.0
    assert [options["return_stats"] for options in calls] == [True, False, False]


def test_prompts_may_be_timed_and_asked_at_fewer_targets(tmp_path):
    options = {"needles": 1, "timed_lengths": (400,), "needle_lengths": (400,), "repeats": 1}
    found = run(tmp_path, texts={}, targets=(0, 0.5, 0.9), prompt_targets=(0.5,), **options)
    names = {t.setting.name for t in timings(found)}
    assert names == {"torch sdpa", "dense", "calibrated, 50%"}
    assert {key[-1] for key, _ in found.all("needle")} == {0.0, 0.5}


def test_torchs_attention_is_left_out_where_a_whole_prompt_does_not_fit(
    tmp_path, monkeypatch, caplog
):
    def check(model, layers, readings, chunk=None):
        if (chunk or readings[0].length) > 400:
            raise ValueError("too large")

    monkeypatch.setattr(timing, "check_memory", check)
    found = run(tmp_path, texts={}, timed_lengths=(400, LENGTH), repeats=1, chunk=128)
    timed = {(t.length, t.setting.name) for t in timings(found)}
    assert (400, "torch sdpa") in timed
    assert (LENGTH, "torch sdpa") not in timed
    assert "torch sdpa is not timed at 800 tokens: too large" in caplog.text
    monkeypatch.setattr(runner, "check_memory", check)
    with pytest.raises(ValueError, match="too large"):
        run(tmp_path / "other", texts={}, timed_lengths=(LENGTH,), chunk=None)


def test_kept_tiles_are_those_of_the_tile_masks(results):
    """In chunks too, which have other query tiles."""
    whole, parts = (packed_tiles(chunk) for chunk in (None, 256))
    for one in (whole, parts):
        assert (one["length"], one["cells"]) == (LENGTH, 13)
        assert one["layers"] == [(0, 4), (1, 4)]
        kept = np.frombuffer(b64decode(one["kept"]), np.uint8).reshape(8, -1)
        cells = np.stack([kept & 15, kept >> 4], -1).reshape(8, -1)[:, : 13 * 14 // 2]
        shares = 1 - np.array(one["skipped"]).flatten()
        # The last tile is shorter than a cell, and cells do not all begin where tiles do.
        assert cells.mean(1) / 15 == pytest.approx(shares, abs=0.06)
        assert (cells[:, 0] == 15).all(), "a first tile is never skipped"
    assert whole["sparsity"] == pytest.approx(parts["sparsity"], abs=0.02)


def packed_tiles(chunk, kind=KeptTiles, calibrated=True):
    model = configured().model
    if not calibrated:
        del model.config.sparse_attention_config
    tokens = torch.tensor([list(TEXTS["first"].encode()[:LENGTH])])
    recording = kind([0, 1], LENGTH, 8)
    with recording_with(recording), torch.inference_mode():
        read(model, tokens, chunk=chunk)
    return recording.packed()


def test_tiles_at_any_threshold_are_those_that_it_keeps(results):
    """Of the lowest layer, whose queries and keys are dense attention's."""
    [((name,), kept)] = results.all("thresholds")
    assert (name, kept["length"], kept["thresholds"][-1]) == ("first", LENGTH, 1)
    with dense_on_purpose(), calling(AtThresholds(current())):
        found = packed_tiles(None, KeptByThreshold, calibrated=False)
    kept = np.frombuffer(b64decode(found["kept"]), np.uint8).reshape(8, -1)
    levels = np.stack([kept & 15, kept >> 4], -1).reshape(8, -1)[:4, : 13 * 14 // 2]
    model = configured().model
    tokens = torch.tensor([list(TEXTS["first"].encode()[:LENGTH])])
    for i in (0, 8, 14):
        threshold = blasst.Threshold(found["thresholds"][i], order="sink_first")
        with (
            blasst.configure(model, prefill=threshold),
            blasst.record() as recording,
            torch.inference_mode(),
        ):
            read(model, tokens)
        skipped = recording.by_head("prefill")[0]
        assert found["skipped"][i][0] == pytest.approx(skipped.tolist(), abs=1e-4)
    assert 0.1 < skipped.mean() < 1
    # The last tile is shorter than a cell, and cells do not all begin where tiles do.
    by_head = np.mean([layers[0] for layers in found["skipped"]], axis=0)
    assert levels.mean(1) / 15 == pytest.approx(1 - by_head, abs=0.06)


@pytest.mark.parametrize(
    ("length", "heads", "cells"),
    [(100, 8, 2), (4096, 270, 64), (131072, 8, 64), (131072, 1024, 39), (131072, 10**7, 1)],
)
def test_pictures_of_tiles_stay_small(length, heads, cells):
    assert cells_of(length, heads) == cells
    assert heads * (cells * (cells + 1) // 2 + 1) // 2 <= 1.1 * SIZE or cells == 1


def test_what_skipping_cost_stands_at_the_token_that_was_predicted(results):
    for (name, scheme, target), value in results.all("text"):
        assert ("cost" in value) == (scheme == Scheme.CALIBRATED)
        if "cost" not in value:
            continue
        assert len(value["cost"]) == len(results.get("pieces", name)) == LENGTH
        assert value["cost"][0] is None, "nothing predicted it"
        mean = sum(value["cost"][1:]) / (LENGTH - 1)
        expected = math.log(value["perplexity"] / value["dense_perplexity"])
        assert mean == pytest.approx(expected, abs=0.005), (name, target)
    assert texts.shown_costs(torch.tensor([0.1234, -2.0]), 2, 5) == [None, 0.12, None, -2.0, None]


def test_sparsity_at_other_lengths_is_a_mean_over_prompts(results, out):
    table = {t.title: t for t in report.tables(results, None)}["Sparsity at other lengths"]
    assert [row[:3] for row in table.rows] == [("300", "90%", "2"), ("600", "90%", "2")]
    values = [v for (length, *_), v in results.all("length") if length == 600]
    assert table.rows[1][3].startswith(f"{sum(values) / 2:.1%} ±")


def test_a_second_run_does_nothing_again(results, out, monkeypatch):
    monkeypatch.setattr(prompted, "answer", None)
    monkeypatch.setattr(texts, "DenseRun", None)
    monkeypatch.setattr(timing, "Alone", None)
    again = run(out, **MEASURED)
    assert sorted(map(str, again.all("text"))) == sorted(map(str, results.all("text")))


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []
    whole = DenseRun.compare

    def stop_at_third(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(DenseRun, "compare", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    found = run(tmp_path)
    assert len(dict(found.all("text"))) == 4
    assert len(calls) == 5, "two texts in two settings, one of them tried twice"
    assert not list(tmp_path.glob(".*")), "no working file is left"


def test_results_of_another_configuration_are_refused(results, out):
    with pytest.raises(ValueError, match="another model, calibration or length"):
        run(out, length=LENGTH - 1)


def test_results_of_other_weights_are_refused(results, out):
    other = configured()
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="another model, calibration or length"):
        evaluate(other, Options((0, 0.9), LENGTH, TEXTS), out=out)


def test_a_text_that_has_changed_is_refused(results, out):
    with pytest.raises(ValueError, match="first has changed since the results that are kept"):
        run(out, texts={"first": TEXTS["second"]})


def test_lengths_of_two_schemes_are_two_rows(tmp_path):
    found = Results(tmp_path / "results.jsonl", "")
    for scheme, sparsity in ((Scheme.CALIBRATED, 0.5), ("bsfa", 0.3)):
        found.put(sparsity, "length", 300, 0, scheme, 0.5)
    [table] = report.tables(found, None)
    assert [row[:4] for row in table.rows] == [
        ("300", "50%, bsfa", "1", "30.0%"),
        ("300", "50%", "1", "50.0%"),
    ]
    path = report.write("Title", "About", found, None, tmp_path)
    assert "Sparsity against length" in path.read_text()


def test_a_folder_in_which_nothing_was_measured_yet_serves_anything(tmp_path):
    with pytest.raises(ValueError, match="leaflet has 5 tokens; 801 are needed"):
        run(tmp_path, texts={"leaflet": "short"}, length=LENGTH + 1)
    run(tmp_path, texts={}, other_lengths=(300,))
    with pytest.raises(ValueError, match="another model, calibration or length"):
        run(tmp_path, texts={}, length=LENGTH + 1)


def test_the_configuration_is_left_as_it_was(tmp_path):
    loaded = configured()
    before = json.dumps(loaded.model.config.sparse_attention_config)
    evaluate(loaded, Options((0.5,), 256), out=tmp_path)
    assert json.dumps(loaded.model.config.sparse_attention_config) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 4096}, "4096 tokens; the model's context is 1024"),
        ({"targets": (0.5, 2)}, "target sparsity is 2"),
        ({"needles": -1}, "needles is -1; it must be at least 0"),
        ({"texts": {"leaflet": "short"}}, "leaflet has 5 tokens; 800 are needed"),
    ],
)
def test_bad_input_is_an_error_that_names_it(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("half",)}, "target sparsity is 'half'; it must be a number, 0 to 1"),
        ({"length": "512"}, "length is '512'; it must be a whole number"),
        ({"needles": 1.5}, r"needles is 1\.5; it must be a whole number"),
        ({"chunk": "128"}, "chunk is '128'; it must be a whole number"),
        ({"timed_lengths": ("512",)}, r"timed_lengths is \('512',\); it must be a whole number"),
    ],
)
def test_what_is_no_number_is_an_error_that_names_it(options, message):
    with pytest.raises(TypeError, match=message):
        Options(**{"targets": (0.5,), "length": 512, **options})


def test_the_command_compares_at_every_nth_position(tmp_path, capsys):
    loaded = configured()
    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    text.write_text(TEXTS["first"])
    arguments = ["evaluate", str(folder), "--target-sparsity", "0", "--length", "512"]
    arguments += ["--needles", "0", "--other-lengths", "--text", str(text), "--out", str(out)]
    assert main([*arguments, "--every", "100"]) == 0
    assert "compared at every 100 positions" in (out / "report.html").read_text()
    # What was compared at 100 positions is not gone on with at each.
    assert main(arguments) == 1
    assert "another model, calibration or length" in capsys.readouterr().err


def test_a_model_without_calibration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="tiny has no sparse_attention_config: calibrate it"):
        evaluate(make_loaded(), Options((0.5,), LENGTH, TEXTS), out=tmp_path)


def test_thresholds_of_another_model_are_found_before_anything_is_measured(tmp_path):
    loaded = configured()
    entry = loaded.model.config.sparse_attention_config
    entry["blasst"]["prefill"]["policies"][0]["ln_threshold"] = torch.zeros(1, 2, 3, 4).tolist()
    with pytest.raises(ValueError, match="thresholds for 3 layers; the model has 2: it is another"):
        evaluate(loaded, Options((0, 0.5), LENGTH, TEXTS), out=tmp_path)
    kept = (tmp_path / "results.jsonl").read_text()
    assert '"text' not in kept
    assert loaded.model.config.sparse_attention_config is not None


def test_the_report_is_one_page_with_its_plots_inside(results, out):
    path = report.write("Title <1>", "About", results, None, out)
    page = path.read_text()
    assert "Title &lt;1&gt;" in page
    assert page.count("<svg") == 9
    assert 'src="http' not in page
    assert "Answers side by side" in page
    assert {p.name for p in out.glob("*.png")} == {
        "needles.png",
        "times.png",
        "accuracy.png",
        "agreement.png",
        "perplexity.png",
        "time.png",
        "trade.png",
        "lengths.png",
        "heads.png",
    }
    kept = json.loads((out / "results.json").read_text())
    about = kept["environment"]
    assert about["versions"]["blasst"] == blasst.__version__
    torchs = (about["versions"]["torch"], torch.__version__)
    assert len({version.partition("+")[0] for version in torchs}) == 1
    assert (about["dtype"], about["device"]) == (
        *("float32", f"{torch.get_num_threads()} CPU threads"),
    )
    assert re.match(r"[0-9a-f]{40}", about["commit"] or 40 * "0")
    assert kept["tables"]["Perplexity and agreement with dense"][0]["setting"] == Scheme.DENSE


def test_a_task_of_lm_eval_runs_and_is_scored_needs_lm_eval(tmp_path, monkeypatch):
    loaded = configured()
    loaded.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = Loaded("tiny", loaded.model, loaded.tokenizer, str(tmp_path / "tokenizer"))
    options = Options((0.9,), 900, tasks=["niah_single_1"], limit=2)
    made = []
    load = lm_eval.load_tasks

    def load_once(*arguments):
        made.append(load(*arguments))
        return made[-1]

    monkeypatch.setattr(lm_eval, "load_tasks", load_once)
    found = dict(evaluate(loaded, options, out=tmp_path).all("task"))
    assert set(found) == {
        ("niah_single_1", index, scheme, target)
        for index in range(2)
        for scheme, target in ((Scheme.DENSE, 0.0), (Scheme.CALIBRATED, 0.9))
    }
    for (_, _, scheme, _), value in found.items():
        assert 0 <= value["score"] <= 1
        assert value["prefill_seconds"] > 0
        assert (value["sparsity"] > 0) == (scheme == Scheme.CALIBRATED)
    documents = [*made[0]["tasks"]["niah_single_1"].test_docs()]
    for (_, index, *_), value in found.items():
        assert value["expected"] == documents[index]["outputs"]


def test_an_unknown_task_is_an_error_that_names_it():
    with pytest.raises(
        ValueError, match=r"no task niah_single_9; choose from niah_single_1.* other \d+"
    ):
        lm_eval.check_tasks(["ruler_vt", "niah_single_9"])


def test_greedy_answers_are_those_of_generate():
    loaded = make_loaded()
    prompt = loaded.tokenizer("A short prompt", return_tensors="pt").input_ids
    expected = loaded.model.generate(prompt, max_new_tokens=8, do_sample=False)
    found = answer(loaded.model, loaded.tokenizer, prompt, 8)
    text = loaded.tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
    assert found.text == text.strip()
    assert found.times.prefill > 0
    assert found.times.decode > 0
    assert blasst.record  # the operator is loaded


def test_default_lengths_have_room_for_a_prompt():
    assert shorter_lengths(4096) == [1024, 1536, 2048, 3072]
    assert shorter_lengths(512) == [256, 384]
    assert parts_of(4096, 3) == [1024, 2048, 4096]
    assert parts_of(500, 3) == [500]
