"""Tests the evaluation with clicks and boxes, with a predictor whose answers are known."""

import json

import numpy as np
import pytest

from sam_jax.cli.main import main
from sam_jax.data.example import BadSample, Example
from sam_jax.data.open import open_source, select
from sam_jax.evaluate.clicks import decode_masks, evaluate_clicks, format_table, predict_clicks
from sam_jax.masks import rle
from sam_jax.masks.overlap import mask_iou
from sam_jax.model.sam import sam_tiny
from sam_jax.predict.predictor import SamPredictor
from sam_jax.weights.formats import load
from tests.sam_jax.evaluate.toy_sources import ToySource

SIZE = (40, 50)


class KnownPredictor(SamPredictor):
    """A predictor that returns known masks for every prompt, and records the prompts."""

    model = sam_tiny()

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def set_image(self, image, tiles):
        self.tiles = tiles

    def predict_many(self, prompts, multimask_output=True):
        copies = [{key: np.array(value) for key, value in prompt.items()} for prompt in prompts]
        self.calls.append((copies, multimask_output))
        masks, scores = zip(*(self.answer(p, multimask_output) for p in copies), strict=True)
        logits = np.arange(len(prompts) * len(scores[0])).reshape(len(prompts), -1, 1, 1)
        return np.stack(masks), np.array(scores), np.broadcast_to(logits, (*logits.shape[:2], 8, 8))


def rectangle(top, left, bottom, right):
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def example(*masks):
    return Example(image=np.zeros((*SIZE, 3), np.uint8), masks=[rle.encode(m) for m in masks])


LARGE, SMALL = rectangle(4, 4, 34, 44), rectangle(10, 10, 25, 25)


def test_scores_are_of_the_predicted_best_and_of_the_actual_best_mask():
    def answer(prompt, multimask):
        masks = [SMALL, LARGE, ~LARGE] if multimask else [LARGE]
        return np.array(masks), [0.9, 0.5, 0.1] if multimask else [0.3]

    scores = evaluate_clicks(KnownPredictor(answer), ToySource([example(LARGE)]), [0])
    small_iou = 15 * 15 / (30 * 40)
    assert scores["objects"] == 1
    assert scores["clicks"]["1"] == {"chosen": round(small_iou, 4), "oracle": 1.0}
    for clicks in ("2", "3", "5", "9"):
        assert scores["clicks"][clicks] == {"chosen": 1.0, "oracle": 1.0}
    assert scores["box"] == {"chosen": round(small_iou, 4), "oracle": 1.0}


def test_next_prompts_are_clicks_on_errors_and_the_predicted_best_logits():
    def answer(prompt, multimask):
        empty = np.zeros(SIZE, bool)
        masks = [empty, SMALL, LARGE] if multimask else [SMALL]
        return np.array(masks), [0.1, 0.9, 0.5] if multimask else [0.3]

    predictor = KnownPredictor(answer)
    rounds = list(predict_clicks(predictor, np.stack([LARGE, SMALL])))
    assert len(rounds) == 9
    first, multimask = predictor.calls[0]
    assert multimask
    assert "mask_input" not in first[0]
    # This is the first pixel with the largest distance from the border, 15.
    assert first[0]["point_coords"].tolist() == [[18, 18]]
    assert first[0]["point_labels"].tolist() == [1]
    second, multimask = predictor.calls[1]
    assert not multimask
    # For the first object, the predicted best of three masks is the second one.
    assert (second[0]["mask_input"] == 1).all()
    assert (second[1]["mask_input"] == 4).all()
    # SMALL was predicted for LARGE, so that pixels are missing.
    assert second[0]["point_labels"].tolist() == [1, 1]
    x, y = second[0]["point_coords"][1]
    assert LARGE[y, x]
    assert not SMALL[y, x]
    # There is no error, so that no click is added.
    assert second[1]["point_labels"].tolist() == [1]
    last, _ = predictor.calls[8]
    assert len(last[0]["point_coords"]) == 9


def test_boxes_are_tight_and_never_empty():
    def answer(prompt, multimask):
        return np.array([LARGE] * (3 if multimask else 1)), [0.5] * (3 if multimask else 1)

    predictor = KnownPredictor(answer)
    line = rectangle(7, 8, 8, 20)
    evaluate_clicks(predictor, ToySource([example(LARGE, line)]), [0])
    boxes, multimask = predictor.calls[-1]
    assert multimask
    assert [prompt["box"].tolist() for prompt in boxes] == [[4, 4, 43, 33], [8, 7, 19, 8]]


def test_scores_are_averaged_over_masks():
    def answer(prompt, multimask):
        return np.array([LARGE] * (3 if multimask else 1)), [0.5] * (3 if multimask else 1)

    everything = np.ones(SIZE, bool)
    images = ToySource([example(*[LARGE] * 70, everything)])
    scores = evaluate_clicks(KnownPredictor(answer), images, [0])
    assert scores["objects"] == 71
    assert scores["clicks"]["9"]["chosen"] == round((70 + 1200 / 2000) / 71, 4)


def test_bad_samples_are_counted_and_an_empty_source_is_refused():
    def answer(prompt, multimask):
        return np.array([LARGE] * (3 if multimask else 1)), [0.5] * (3 if multimask else 1)

    empty = example(np.zeros(SIZE, bool))
    images = ToySource([BadSample("broken image", "cut"), example(LARGE), empty, example()])
    scores = evaluate_clicks(KnownPredictor(answer), images, range(4))
    assert scores["bad_samples"] == 3
    assert "3 images could not be used" in format_table(scores)
    with pytest.raises(BadSample, match="the image has no masks"):
        decode_masks([])
    with pytest.raises(ValueError, match="no mask to evaluate on; 1 image"):
        evaluate_clicks(KnownPredictor(answer), images, [0])


def test_iou_of_masks():
    empty = np.zeros(SIZE, bool)
    assert mask_iou(LARGE, SMALL) == 225 / 1200
    assert mask_iou(LARGE, empty) == 0
    assert mask_iou(empty, empty) == 1


def test_the_packaged_model_segments_held_out_scenes():
    held_out = select(open_source("scenes"), "::1000")
    evaluation = evaluate_clicks(SamPredictor(*load("sam_tiny")), held_out, range(6))
    assert evaluation["clicks"]["9"]["chosen"] > 0.75, evaluation
    assert evaluation["clicks"]["1"]["oracle"] > 0.55, evaluation
    assert evaluation["box"]["chosen"] > 0.6, evaluation


def predictor_in_tiles():
    """Returns a predictor that finds an object only when the image is in tiles."""

    def answer(prompt, multimask):
        mask = np.zeros(SIZE, bool) if predictor.tiles == "none" else LARGE
        return np.array([mask] * (3 if multimask else 1)), [0.5] * (3 if multimask else 1)

    predictor = KnownPredictor(answer)
    return predictor


def test_figures_with_tiles_are_beside_those_of_the_entire_image():
    predictor = predictor_in_tiles()
    images = ToySource([example(LARGE), example(LARGE, LARGE)])
    without = evaluate_clicks(predictor, images, [0, 1])
    scores = evaluate_clicks(predictor, images, [0, 1], tiles=64)
    assert list(without) == [
        *("objects", "clicks", "box", "fill", "bound", "large", "calibration"),
        *("ceiling", "bad_samples"),
    ]
    assert {key: scores[key] for key in without} == without
    assert scores["tiles"]["size"] == 64
    assert scores["tiles"]["box"] == {"chosen": 1, "oracle": 1}
    assert set(scores["tiles"]["clicks"]) == set(without["clicks"])
    table = format_table(scores).splitlines()
    assert table[1].split() == ["entire", "image", "tiles:", "64"]
    assert table[3].split() == ["1", "click", "0.000", "0.000", "1.000", "1.000"]
    box = ["box", "0.000", "0.000", "1.000", "1.000"]
    assert table[8].split() == [*box, "filled", "box:", "1.000"]
    assert table[9].split()[:10] == ["large,", *box, "filled", "box:", "1.000", "(3"]
    assert len(format_table(without).splitlines()) == len(table) - 1


def test_a_model_for_windows_around_objects_is_evaluated_on_tiles_by_default():
    images, predictor = ToySource([example(LARGE)]), predictor_in_tiles()
    predictor.model = sam_tiny(object_share=(0.25, 0.75))
    scores = evaluate_clicks(predictor, images, [0])
    assert (scores["tiles"]["size"], scores["tiles"]["box"]["chosen"]) == ("auto", 1)
    entire = evaluate_clicks(predictor, images, [0], tiles="none")
    assert "tiles" not in entire
    assert {key: scores[key] for key in entire} == entire


def test_images_of_one_tile_have_the_same_figures(square):
    scenes = select(open_source("scenes:48x64"), ":2")
    scores = evaluate_clicks(SamPredictor(*square), scenes, range(2), tiles=64)
    entire = {key: scores[key] for key in scores["tiles"] if key != "size"}
    assert scores["tiles"] == {"size": 64} | entire
    assert set(scores) - set(entire) == {"objects", "ceiling", "bad_samples", "tiles"}


def test_small_objects_of_large_images_need_tiles():
    scenes = select(open_source("scenes:64x64"), "::1000")
    large = np.zeros((400, 400, 3), np.uint8)
    masks = []
    for i, (top, left) in enumerate([(0, 0), (0, 200), (200, 0), (300, 300)]):
        large[top : top + 64, left : left + 64] = scenes[i].image
        for mask in scenes[i].masks:
            masks.append(np.zeros((400, 400), bool))
            masks[-1][top : top + 64, left : left + 64] = rle.decode(mask)
    images = ToySource([Example(image=large, masks=[rle.encode(mask) for mask in masks])])
    scores = evaluate_clicks(SamPredictor(*load("sam_tiny")), images, [0], tiles="auto")
    assert scores["tiles"]["box"]["chosen"] > scores["box"]["chosen"] + 0.15, scores
    assert scores["tiles"]["clicks"]["9"]["chosen"] > scores["clicks"]["9"]["chosen"] + 0.15


def test_the_command_writes_the_printed_scores(square, tmp_path, capsys, monkeypatch):
    from sam_jax.weights.formats import save

    save(tmp_path / "weights", *square)
    monkeypatch.chdir(tmp_path)
    arguments = ["--weights", "weights", "--source", "scenes:48x64", "--index", "3:4"]
    files = ["--json", "scores.json", "--objects", "objects.jsonl"]
    assert main(["evaluate", "clicks", *arguments, *files]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["source"] == "scenes:48x64"
    assert scores["index"] == "3:4"
    assert set(scores["clicks"]) == {"1", "2", "3", "5", "9"}
    rows = list(map(json.loads, (tmp_path / "objects.jsonl").read_text().splitlines()))
    assert [row["mask"] for row in rows] == list(range(scores["objects"]))
    assert {row["image"] for row in rows} == {open_source("scenes:48x64").name(3)}
    for kind in ("chosen", "oracle"):
        mean = np.mean([row["clicks"]["9"][kind] for row in rows])
        assert mean == pytest.approx(scores["clicks"]["9"][kind], abs=2e-4)
    out = capsys.readouterr().out
    assert f"{scores['box']['oracle']:.3f}" in out
    assert f"over {scores['objects']} objects" in out


def test_the_command_names_wrong_arguments(tmp_path, capsys):
    assert main(["evaluate", "clicks", "--weights", "w", "--source", "photos:x"]) == 1
    assert "photos" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "clicks", "--weights", "w", "--source", "scenes", "--tiles", "7"])
    assert "'7' is not auto, none or a number of pixels of at least 16" in capsys.readouterr().err
    arguments = ["--weights", "w", "--source", "scenes", "--index", "a"]
    assert main(["evaluate", "clicks", *arguments]) == 1
    assert "0::5" in capsys.readouterr().err
