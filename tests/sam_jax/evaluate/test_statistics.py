"""Tests statistics of masks with known measurements."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from sam_jax.cli.main import main
from sam_jax.data.example import BadSample, Example
from sam_jax.evaluate.statistics import Measurement, format_table, measure, summarize
from sam_jax.masks import rle
from sam_jax.model.sam import replace_fields
from sam_jax.weights.formats import save
from tests.sam_jax.evaluate.toy_sources import ToySource


def mask(*rectangles, size=(4, 6)):
    """Returns the union of rectangles (top, left, bottom, right)."""
    pixels = np.zeros(size, bool)
    for top, left, bottom, right in rectangles:
        pixels[top:bottom, left:right] = True
    return rle.encode(pixels)


def example(*masks):
    return Example(image=np.zeros((1, 1, 3), np.uint8), masks=masks)


SQUARE, FULL = mask((1, 2, 3, 4)), mask((0, 0, 4, 6))
CORNER = mask((0, 0, 2, 1), (0, 0, 1, 2), size=(10, 10))  # its hull is larger by half a pixel


def test_measures_of_known_masks():
    source = ToySource([example(SQUARE, FULL), example(CORNER)])
    first, second = measure(source, [0, 1])
    assert (first.index, first.name, first.masks, first.reason) == (0, "0.jpg", 2, None)
    np.testing.assert_array_equal(
        first.values, [[math.sqrt(4 / 24), 0, 0.5, 0.5], [1, 0, 0.5, 0.5]]
    )
    np.testing.assert_allclose(
        second.values, [[math.sqrt(0.03), 0.5 / 3.5, 2.5 / 30, 2.5 / 30]], rtol=1e-15
    )


def test_histograms_and_means_of_known_masks():
    source = ToySource([example(SQUARE, FULL), example(), example(*[SQUARE] * 11)])
    found = json.loads(json.dumps(summarize(measure(source, range(3)))))
    assert (found["samples"], found["usable"], found["masks"]) == (3, 3, 13)
    assert found["masks_per_image"] == {
        "mean": round(13 / 3, 4),
        "bins": ["0-10", "11-50", "51-100", "101-200", ">200"],
        "images": [2, 1, 0, 0, 0],
    }
    size, concavity, center = (found[key] for key in ("relative_size", "concavity", "center"))
    assert size["bounds"] == concavity["bounds"] == [round(0.02 * i, 2) for i in range(51)]
    assert size["mean"] == round((12 * math.sqrt(1 / 6) + 1) / 13, 4)
    assert size["masks"] == [12 if i == 20 else i == 49 for i in range(50)]  # 0.408, and 1
    assert concavity["mean"] == 0
    assert concavity["masks"] == [13] + 49 * [0]
    assert center["mean"] == [0.5, 0.5]
    assert center["bounds"] == [round(0.05 * i, 2) for i in range(21)]
    assert np.array(center["masks"])[10, 10] == np.sum(center["masks"]) == 13


def test_centers_are_by_rows():
    found = summarize(measure(ToySource([example(mask((0, 5, 1, 6)))]), [0]))
    assert np.argwhere(found["center"]["masks"]).tolist() == [[2, 18]]  # y 1/8, x 11/12


def test_every_number_of_masks_is_in_a_bin():
    numbers = [0, 10, 11, 50, 51, 100, 101, 200, 201, 5000]
    found = summarize(
        [Measurement(i, "x", n, values=np.zeros((n, 4))) for i, n in enumerate(numbers)]
    )
    assert found["masks_per_image"]["images"] == [2, 2, 2, 2, 2]


def test_unusable_images_are_reported_and_skipped():
    empty, broken = mask(), {"size": [4, 6], "counts": [23]}
    source = ToySource(
        [BadSample("broken image", "cut"), example(SQUARE), example(SQUARE, empty), example(broken)]
    )
    found = summarize(measure(source, range(4)))
    assert (found["samples"], found["usable"], found["masks"]) == (4, 1, 1)
    assert found["reasons"] == {"broken image": 1, "empty mask": 1, "broken mask": 1}
    assert [bad["index"] for bad in found["bad"]] == [0, 2, 3]
    assert found["bad"][1]["detail"] == "mask 1 has no pixels"
    assert "mask 0: runs must sum to 4 * 6 = 24, got 23" in found["bad"][2]["detail"]
    assert "1 masks in 1 of 4 images" in format_table(found)


def test_images_without_masks_count():
    source = ToySource([BadSample("no masks", ""), example(SQUARE), example(SQUARE, SQUARE)])
    found = summarize(measure(source, range(3)))
    assert (found["usable"], found["masks"]) == (3, 3)
    assert found["masks_per_image"]["mean"] == 1.0
    assert found["masks_per_image"]["images"][0] == 3


def test_no_mask_at_all_is_an_error():
    with pytest.raises(ValueError, match="no mask to measure in 2 images"):
        summarize(measure(ToySource([example(), BadSample("no masks", "")]), [0, 1]))


@pytest.fixture
def labels(tmp_path):
    """Returns a function that writes a source of one image with a mask for each rectangle."""

    def write(name, *rectangles, size=(20, 30)):
        folder = tmp_path / name / "a"
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        Image.new("RGB", size[::-1]).save(folder / "images" / "a.png")
        for i, rectangle in enumerate(rectangles):
            pixels = rle.decode(mask(rectangle, size=size))
            Image.fromarray(np.uint8(255 * pixels)).save(folder / "masks" / f"{i}.png")
        return f"labels:{tmp_path / name}"

    return write


def test_the_command_writes_the_printed_statistics(labels, tmp_path, capsys):
    first = labels("first", (0, 0, 10, 15), (10, 15, 20, 30))
    second = labels("second", (0, 0, 10, 12), (0, 20, 10, 30))
    out = tmp_path / "new" / "out"
    assert main(["dataset", "stats", first, "--compare-to", second, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2 masks in 1 of 1 images; means:",
        "masks per image     2.000",
        "relative size       0.500",
        "concavity           0.000",
        "center, x           0.500",
        "center, y           0.500",
        "masks per image: 0-10 in 100 %, 11-50 in 0 %, 51-100 in 0 %, 101-200 in 0 %, >200 in 0 %",
        "1 matched pairs of masks in 1 images of both sources",
        "IoU of a pair: 0.0 % above 0.9, 100.0 % above 0.75, mean 0.800",
        "unmatched: 1 masks of the first source, 1 of the second",
        f"statistics.json, samples.png, shapes.png, centers.png, quality.png are in {out}",
    ]
    written = json.loads((out / "statistics.json").read_text())
    assert (written["source"], written["index"], written["masks"]) == (first, ":", 2)
    assert written["relative_size"]["masks"][25] == 2
    assert (written["against"]["source"], written["against"]["mean_iou"]) == (second, 0.8)
    for name in ("samples.png", "shapes.png", "centers.png", "quality.png"):
        with Image.open(out / name) as plot:
            assert len(np.unique(np.asarray(plot.convert("L")))) > 10


def test_the_command_without_out_writes_nothing(labels, tmp_path, capsys, monkeypatch):
    source = labels("first", (0, 0, 10, 15))
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "stats", source]) == 0
    assert "relative size       0.500" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_the_command_names_unusable_images(labels, tmp_path, capsys):
    first, second = (labels(name, (0, 0, 9, 9)) for name in ("first", "second"))
    broken = tmp_path / "first" / "b" / "images"
    broken.mkdir(parents=True)
    (broken.parent / "masks").mkdir()
    (broken.parent / "masks" / "0.png").write_bytes(b"text")
    assert main(["dataset", "stats", first]) == 0
    line, *rest = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{broken / 'b.png'}: broken mask: ")
    assert rest[0] == "1 masks in 1 of 2 images; means:"
    assert main(["dataset", "stats", first, "--compare-to", second]) == 1
    assert "got 2 images and 1" in capsys.readouterr().err
    assert main(["dataset", "stats", first, "--index", "0", "--compare-to", first]) == 0
    other = labels("other", (0, 0, 9, 9), size=(30, 20))
    assert main(["dataset", "stats", second, "--compare-to", other]) == 1
    assert "must be of one size; got 20 x 30 and 30 x 20" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(labels, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sam_jax.visualize.dataset_plots", None)
    out = tmp_path / "out"
    assert main(["dataset", "stats", labels("first", (0, 0, 9, 9)), "--out", str(out)]) == 1
    assert "pip install -e '.[viz]' in a checkout" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_measures_the_resolution_of_a_model(labels, square, tmp_path, capsys):
    save(tmp_path / "weights", *square)
    source = labels("first", (30, 40, 45, 48), (200, 90, 231, 110), size=(256, 192))
    weights, out = str(tmp_path / "weights"), tmp_path / "out"
    arguments = ["dataset", "stats", source, "--model", weights, "--tiles", "auto"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "resolution, entire image: objects are 2.9 decoder pixels long" in printed
    assert "resolution, tiles auto: objects are" in printed
    written = json.loads((out / "statistics.json").read_text())["resolution"]
    assert (written["model"], written["objects"]) == (weights, 2)
    tiled = written["tiles"]
    assert (tiled["size"], tiled["objects"]) == ("auto", 2)
    assert tiled["side"]["50"] > 4 * written["side"]["50"]
    assert tiled["bound"] > written["bound"] + 0.05
    save(tmp_path / "windows", replace_fields(square[0], object_share=(0.25, 0.75)), square[1])
    arguments = ["dataset", "stats", source, "--model", str(tmp_path / "windows")]
    for option in ([], ["--tiles", "none"]):
        assert main([*arguments, *option]) == 0
        assert ("resolution, tiles auto" in capsys.readouterr().out) is (option == [])
    assert main(["dataset", "stats", source, "--tiles", "32"]) == 1
    assert "--tiles 32 needs --model" in capsys.readouterr().err
