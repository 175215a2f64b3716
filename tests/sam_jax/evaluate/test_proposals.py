"""Tests the average recall of proposals on objects with known IoUs."""

import json

import numpy as np
import pytest
from PIL import Image

from sam_jax.cli.main import main
from sam_jax.data.example import BadSample
from sam_jax.data.open import select
from sam_jax.data.sources.sa1b import open_sa1b
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.evaluate.proposals import (
    classify_by_area,
    evaluate_proposals,
    format_table,
    match_proposals,
    pair_images,
)
from sam_jax.masks import rle
from tests.sam_jax.evaluate.toy_sources import ToySource, columns


def same_recall(recall):
    return {"10": recall, "100": recall, "1000": recall}


def test_recall_of_known_ious():
    truths = ToySource([[columns(0, 10), columns(20, 40)], [columns(0, 10)]])
    proposals = ToySource([[columns(20, 36), columns(50, 60)], [columns(0, 10)]])
    scores = json.loads(json.dumps(evaluate_proposals(proposals, truths, [(0, 0), (1, 1)])))
    # An IoU of 16/20 reaches the seven thresholds up to 0.8. The object of image 1 is found.
    recall = round((0.7 + 1) / 3, 4)
    nothing = same_recall(None)
    assert scores == {
        "images": 2,
        "objects": {"all": 3, "small": 3, "medium": 0, "large": 0},
        "recall": {
            "all": same_recall(recall),
            "small": same_recall(recall),
            "medium": nothing,
            "large": nothing,
        },
        "bad_samples": 0,
    }
    assert format_table(scores).splitlines() == [
        "average recall of the best proposals of 2 images",
        "          objects    AR@10   AR@100  AR@1000",
        "all             3    0.567    0.567    0.567",
        "small           3    0.567    0.567    0.567",
        "medium          0",
        "large           0",
    ]


def test_only_the_best_proposals_count():
    other = [columns(90, 91)]
    proposals = ToySource([[*other * 9, columns(0, 10), *other * 90, columns(20, 30)]])
    truths = ToySource([[columns(0, 10), columns(20, 30), columns(40, 50)]])
    recall = evaluate_proposals(proposals, truths, [(0, 0)])["recall"]["all"]
    assert recall == {"10": 0.3333, "100": 0.3333, "1000": 0.6667}
    late = ToySource([[*other * 1000, columns(0, 10)]])
    assert evaluate_proposals(late, truths, [(0, 0)])["recall"]["all"] == same_recall(0)


def test_matching_is_one_to_one():
    everything = np.ones((1, 2), bool)
    found = match_proposals(np.array([[0.6, 0.7], [0.0, 0.9], [0.7, 0.0]]), everything)[:, 0]
    # At 0.5, the first proposal matches the second object, whose IoU is higher. The third proposal
    # then matches the first object.
    assert found[0].tolist() == [True, False, True]
    assert found[5].tolist() == [False, True, False]  # at 0.75
    assert found[-1].tolist() == [False, False, False]


def test_the_last_of_objects_with_equal_iou_is_found():
    found = match_proposals(np.array([[0.5, 0.5], [0.5, 0.0]]), np.ones((1, 2), bool))
    assert found[0, 0].tolist() == [True, True]
    found = match_proposals(np.array([[0.5, 0.5], [0.0, 0.5]]), np.ones((1, 2), bool))
    assert found[0, 0].tolist() == [True, False]


def test_sizes_are_matched_independently_and_share_their_borders():
    size = (96, 100)
    masks = [columns(0, n, size) for n in (10, 11, 96, 97)]  # 960, 1056, 9216 and 9312 pixels
    exactly = rle.encode(np.pad(np.ones((32, 32), bool), ((0, 64), (0, 68))))
    assert classify_by_area([*masks, exactly]).astype(int).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 1],
        [0, 1, 1, 0, 1],
        [0, 0, 1, 1, 0],
    ]
    # Objects of another size do not use up proposals: the only proposal finds the large object.
    iou = np.array([[0.8, 0.9]])
    in_range = np.array([[True, True], [True, False], [False, False], [False, True]])
    assert match_proposals(iou, in_range)[0, :, 0].tolist() == [True, True, False, True]


def test_an_image_without_proposals_finds_no_object():
    none = BadSample("no masks", "the image has no masks")
    truths = ToySource([[columns(0, 10)], [columns(0, 10)], none])
    proposals = ToySource([none, [columns(0, 10)], [columns(0, 10)]])
    scores = evaluate_proposals(proposals, truths, [(i, i) for i in range(3)])
    assert (scores["images"], scores["objects"]["all"], scores["bad_samples"]) == (3, 2, 0)
    assert scores["recall"]["all"] == same_recall(0.5)


def test_unreadable_images_are_counted_and_left_out():
    bad, broken = BadSample("broken json", "cut"), {"size": [4, 100], "counts": [1]}
    truths = ToySource([bad, [columns(0, 10)], [columns(0, 10)], [columns(0, 10)]])
    proposals = ToySource([[columns(0, 10)], bad, [broken], [columns(0, 10)]])
    pairs = [(i, i) for i in range(4)]
    scores = evaluate_proposals(proposals, truths, pairs)
    assert (scores["images"], scores["bad_samples"]) == (1, 3)
    assert scores["recall"]["all"] == same_recall(1)
    assert "3 images could not be used" in format_table(scores)
    with pytest.raises(ValueError, match="no object to be found; 3 images could not be used"):
        evaluate_proposals(proposals, truths, pairs[:3])


def test_images_of_another_size_are_refused():
    other = ToySource([[columns(0, 10, size=(100, 4))]])
    with pytest.raises(ValueError, match=r"0\.jpg.*must be of one size; got 4 x 100 and 100 x 4"):
        evaluate_proposals(other, ToySource([[columns(0, 10)]]), [(0, 0)])


@pytest.fixture
def labeled(tmp_path):
    """Returns a function that writes scenes as SA-1B files, without the last mask of each."""

    def write(*indices):
        for index in indices:
            image, masks = (example := SCENES[index]).image, example.masks[:-1]
            Image.fromarray(image).save(tmp_path / f"sa_{index}.jpg")
            record = {
                "image": {"height": image.shape[0], "width": image.shape[1]},
                "annotations": [{"segmentation": mask} for mask in masks],
            }
            (tmp_path / f"sa_{index}.json").write_text(json.dumps(record))
        return str(tmp_path)

    return write


SCENES = SyntheticScenes((48, 64))


def test_images_are_paired_by_their_number(labeled):
    proposals = open_sa1b(labeled(2, 10, 3, 7))
    assert proposals.ids.tolist() == [2, 3, 7, 10]
    assert pair_images(proposals, select(SCENES, ":8")) == [(0, 2), (1, 3), (2, 7)]
    assert pair_images(proposals, select(SCENES, "::5")) == [(3, 10)]
    with pytest.raises(ValueError, match="none of the 3 selected images has proposals"):
        pair_images(proposals, select(SCENES, "20:23"))
    with pytest.raises(ValueError, match=r"sa_0 to sa_9 for the 10 images.*got sa_10"):
        pair_images(proposals, select(SyntheticScenes((48, 64), count=10), ":"))


def test_other_sources_are_paired_by_their_order():
    source, fewer = ToySource([[]] * 3), ToySource([[]] * 2)
    assert pair_images(source, select(source, "1:")) == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="got 2 images with proposals, and 3 in the source"):
        pair_images(fewer, select(source, "1:"))


def test_the_command_evaluates_an_unfinished_run(labeled, tmp_path, capsys):
    proposals, scores = f"sa1b:{labeled(1, 2, 4)}", tmp_path / "scores.json"
    options = ["--source", "scenes:48x64", "--index", ":4", "--json", str(scores)]
    assert main(["evaluate", "proposals", proposals, *options]) == 0
    objects = sum(len(SCENES[i].masks) for i in (1, 2))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 of 4 images have proposals"
    assert out[3].split()[:2] == ["all", str(objects)]
    written = json.loads(scores.read_text())
    assert [written[key] for key in ("source", "index", "proposals")] == [
        "scenes:48x64",
        ":4",
        proposals,
    ]
    assert written["recall"]["all"]["10"] >= round((objects - 2) / objects, 4)
    assert written["recall"]["all"]["10"] < 1


def test_the_former_spelling_still_works(labeled, tmp_path, capsys):
    options = ["--proposals", f"sa1b:{labeled(1)}", "--source", "scenes:48x64", "--index", ":4"]
    assert main(["evaluate", *options]) == 0
    captured = capsys.readouterr()
    assert "use `sam-jax evaluate proposals P`" in captured.err
    assert "1 of 4 images have proposals" in captured.out
