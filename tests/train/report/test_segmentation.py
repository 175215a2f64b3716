"""Checks that the report is complete and that its texts do not overlap and are not cut off."""

import copy
import html.parser
import itertools
import json
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

from configs.sam_tiny import config
from sam_jax.data.example import BadSample, Example, Source
from sam_jax.data.open import select
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.evaluate.clicks import measure_objects
from sam_jax.evaluate.object_scores import object_rows
from sam_jax.masks import rle
from sam_jax.model.sam import sam_tiny
from sam_jax.predict.predictor import SamPredictor
from tests.sam_jax.evaluate.toy_sources import ToySource
from train.overrides import to_dict
from train.report import calibration, curves, gallery, page, panels, qualitative, segmentation
from train.summary import format_duration, write_summary

EVALUATION = {
    "source": "scenes",
    "index": "::1000",
    "objects": 571,
    "clicks": {
        "1": {"chosen": 0.7121, "oracle": 0.8034},
        "2": {"chosen": 0.7953, "oracle": 0.7953},
        "3": {"chosen": 0.8405, "oracle": 0.8405},
        "5": {"chosen": 0.8823, "oracle": 0.8823},
        "9": {"chosen": 0.9154, "oracle": 0.9154},
    },
    "box": {"chosen": 0.8612, "oracle": 0.8897},
    "fill": 0.7246,
    "bound": 0.9789,
    "calibration": {
        "1": [
            {"predicted": -0.0213, "true": 0.0, "objects": 1},
            {"predicted": 0.7123, "true": 0.7345, "objects": 270},
            {"predicted": 1.0241, "true": 0.9321, "objects": 300},
        ],
        "box": [{"predicted": 0.8841, "true": 0.8612, "objects": 571}],
    },
    "ceiling": 0.7752,
    "bad_samples": 0,
}


MEANS = {key: EVALUATION[key] for key in ("clicks", "box", "fill", "bound")}
TILED = EVALUATION | {
    "large": {"objects": 123, **MEANS, "fill": 0.6938},
    "tiles": {
        "size": "auto",
        **MEANS,
        "box": {"chosen": 0.9132, "oracle": 0.9246},
        "large": {"objects": 123, **MEANS, "bound": 0.9912},
        "calibration": EVALUATION["calibration"],
    },
}


class Stub(SamPredictor):
    """A predictor whose masks cover the image except one eighth of its rows.

    The number of clicks determines which eighth is missing; with a box, it is the first one.
    """

    model = sam_tiny(object_share=(0.25, 0.75))

    def __init__(self):
        self.tiles = []

    def set_image(self, image, tiles=None):
        self.size = image.shape[:2]
        self.tiles.append(tiles)

    def predict_many(self, prompts, multimask_output=True):
        m = 3 if multimask_output else 1
        row = np.arange(self.size[0])[:, None] * 8 // self.size[0]
        masks = np.ones((len(prompts), m, *self.size), bool)
        for prompt, outputs in zip(prompts, masks, strict=True):
            for i, mask in enumerate(outputs):
                mask &= row != (len(prompt.get("point_coords", ())) + i) % 8
        scores = np.tile(np.array([0.3, 0.9, 0.5][:m], np.float32), (len(prompts), 1))
        return masks, scores, np.zeros((len(prompts), m, 4, 4), np.float32)


class UnusualImages(Source):
    """Images of different sizes; the third is broken, and the mask of the second covers it all."""

    sizes = ((40, 200), (200, 40), (60, 60), (1300, 700), (64, 48))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if index == 2:
            raise BadSample("broken image", "truncated")
        example = SyntheticScenes(self.sizes[index])[index]
        if index == 1:
            example = Example(example.image, [rle.encode(np.ones(self.sizes[1], bool))])
        return example

    def name(self, index):
        return f"<b>$x_{index}$ 漢字"


def make_rows(count, every=10):
    """Returns logged rows of training metrics."""
    return [
        {
            "step": every * i,
            "loss": 3 / i,
            "miou_of_rounds": [i / (i + 2), i / (i + 1)],
            "step_seconds": 0.5,
        }
        for i in range(1, count + 1)
    ]


def write_report(
    workdir, source, rows, evaluations=(), name="scenes", evaluation=EVALUATION, predictor=None
):
    """Writes a report and returns its folder."""
    indices = range(min(len(source), 5))
    objects = object_rows(measure_objects(Stub(), source, indices, None)[0])
    run = to_dict(config)
    run["data"]["source"] = name
    run["num_steps"] = rows[-1]["step"]
    (workdir / "config.json").write_text(json.dumps(run))
    write_summary(workdir, {"model": "Sam, 352,648 parameters", "workdir": "runs/a b"})
    for file, lines in (*(("metrics", rows), ("evaluations", evaluations), ("objects", objects)),):
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (workdir / f"{file}.jsonl").write_text(text)
    written = segmentation.write_report(
        workdir, predictor or Stub(), source, evaluation | {"source": name}
    )
    assert written == workdir / "report" / "index.html"
    return written.parent


class Page(html.parser.HTMLParser):
    """A parser that collects the tags, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("source", "steps", "evaluated", "objects"),
    [
        (select(SyntheticScenes((64, 96)), "::10000"), 40, [100, 200], 8),
        (select(SyntheticScenes((48, 48)), "7"), 1, [], 1),
        (UnusualImages(), 3, [], 4),
    ],
    ids=["many", "one", "unusual"],
)
def test_report_contains_figures_and_escapes_names(tmp_path, source, steps, evaluated, objects):
    hostile = "labels:<script>alert(1)</script>&"
    folder = write_report(
        tmp_path, source, make_rows(steps), [{"step": s} | EVALUATION for s in evaluated], hostile
    )
    pictures = ("curves.png", "clicks.png", "calibration.png", "gallery.png", "examples.png")
    files = {path.name for path in folder.iterdir()}
    assert files == {*pictures, "index.html"}, "there must be no temporary files"
    for name in pictures:
        picture = matplotlib.image.imread(folder / name)
        assert 600 < picture.shape[1] < 2000
        assert 200 < picture.shape[0] < 5000
        assert picture[..., :3].std() > 0.05, "the picture must not be empty"

    parsed = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert not parsed.tags & {"script", "b", "iframe", "link"}
    large = ["examples.png", "gallery.png"]  # the pictures are links to themselves
    assert sorted(parsed.links) == sorted(["../config.json", "../objects.jsonl", *pictures, *large])
    assert parsed.text.count(hostile) >= 4  # title, heading, command, configuration
    for number in ("0.712", "0.803", "0.915", "0.861", "0.890", "571", "0.7752", "0.725", "0.979"):
        assert number in parsed.text
    assert parsed.text.count(", mask ") == objects + 9
    examples = parsed.text.partition("Held-out examples")[2].partition("Typical objects")[0]
    assert examples.count(source.name(0)) == 1
    assert "sam-jax predict IMAGE --weights 'runs/a b/weights' --point X,Y" in parsed.text
    facts = parsed.text.partition("\nRun\n")[2].split("\n")
    assert "modelSam, 352,648 parameters" in facts
    duration = format_duration(0.5 * 10 * steps)
    assert f"training{duration}" in facts
    assert any(fact.startswith("revision") for fact in facts)
    assert any("jax " in fact for fact in facts if fact.startswith("versions"))


@pytest.mark.parametrize(("evaluation", "tiles"), [(TILED, "auto"), (EVALUATION, "none")])
def test_pictures_use_the_tiles_of_the_evaluation(tmp_path, evaluation, tiles):
    predictor = Stub()
    source = select(SyntheticScenes((48, 48)), "7")
    write_report(tmp_path, source, make_rows(2), evaluation=evaluation, predictor=predictor)
    assert predictor.tiles == [tiles] * (1 + 9), "an example and the gallery"


def test_tables_have_the_entire_image_beside_tiles():
    text = " ".join(re.sub("<[^>]*>", " ", segmentation.make_tables(TILED)).split())
    assert "571 objects entire image tiles: auto prompt chosen oracle chosen oracle" in text
    assert "box 0.861 0.890 0.913 0.925 filled box 0.725 0.725" in text
    assert "123 objects, each at least 1% of the image" in text
    assert "filled box 0.694 0.725 resolution bound 0.979 0.991" in text
    summary = segmentation.summarize(TILED)
    assert "; in tiles 0.712 after 1 click, 0.915 after 9 clicks, 0.913 from a box" in summary


def test_gallery_rows_are_at_percentiles_of_the_iou_of_boxes():
    rows = [{"image": str(i), "box": {"chosen": (7 * i % 101) / 101}} for i in range(101)]
    chosen = [round(101 * row["box"]["chosen"]) for row in gallery.choose_rows(rows)]
    assert chosen == [9, 10, 11, 49, 50, 51, 89, 90, 91]
    # With tiles, it is their IoU that counts.
    tiled = [row | {"tiles": {"box": {"chosen": -row["box"]["chosen"]}}} for row in rows]
    chosen = [round(101 * row["box"]["chosen"]) for row in gallery.choose_rows(tiled)]
    assert chosen == [91, 90, 89, 51, 50, 49, 11, 10, 9]
    for count in (1, 2, 4):
        few = [row["image"] for row in gallery.choose_rows(rows[:count])]
        assert len(few) == 3 * min(count, 3)
        assert set(few) == {str(i) for i in range(count)}


def test_small_objects_are_cropped():
    mask = np.zeros((200, 300), bool)
    mask[90:100, 0:20] = True
    rows, columns = panels.crop_if_small(mask)
    assert (columns.start, columns.stop) == (0, 60), "three boxes, moved into the image"
    assert rows.stop - rows.start == 60
    assert abs(rows.start + rows.stop - 189) <= 1
    mask[50:150] = True
    assert mask[panels.crop_if_small(mask)].shape == (200, 300)
    assert mask[panels.crop_around(mask)].shape == (200, 300)


def test_only_dark_images_are_brightened():
    image = np.random.default_rng(0).integers(0, 40, (20, 20, 3)).astype(np.uint8)
    assert panels.brighten(image).max() > 250
    image[:5] = 200
    np.testing.assert_array_equal(panels.brighten(image), image)
    assert not panels.brighten(np.zeros((4, 4, 3), np.uint8)).any()


def test_report_contains_the_fields_of_the_config(tmp_path):
    text = (
        write_report(tmp_path, select(SyntheticScenes((32, 32)), "7"), make_rows(2)) / "index.html"
    ).read_text()
    missing = {name for name in page.MAIN_FIELDS if f">{name}<" not in text}
    assert missing == {
        *("model.image_size", "model.patch_size", "model.embed_dim", "model.depth"),
        *("model.dtype", "model.mask_ratio", "data.min_area"),
    }, "only fields of autoencoders may be missing"


def test_chosen_objects_have_different_sizes_and_images():
    source = select(SyntheticScenes((96, 96)), "::500")
    chosen = list(qualitative.choose_objects(source))
    assert len({name.split(",")[0] for name, _, _ in chosen}) == qualitative.NUM_OBJECTS
    areas = [mask.mean() for _, _, mask in chosen]
    assert min(areas) >= qualitative.MIN_AREA_FRACTION
    assert max(areas) > 4 * min(areas)
    again = list(qualitative.choose_objects(source))
    assert [name for name, _, _ in again] == [name for name, _, _ in chosen]
    # If all objects are tiny, one of them is chosen.
    dot = np.zeros((100, 100), bool)
    dot[3, 4] = True
    tiny = [Example(np.zeros((100, 100, 3), np.uint8), [rle.encode(dot)])]
    ((_, _, mask),) = qualitative.choose_objects(select(ToySource(tiny), ":"))
    np.testing.assert_array_equal(mask, dot)


def test_clicks_are_where_the_prediction_is_wrong():
    mask = np.zeros((80, 40), bool)
    mask[10:70] = True
    shown = qualitative.click_on_object(Stub(), "", np.zeros((80, 40, 3), np.uint8), mask)
    one, three, nine = shown.predictions
    assert one.best == 1
    assert one.masks.shape == (3, 80, 40)
    assert one.clicks == [(19, 29, 1)]
    assert [len(p.clicks) for p in shown.predictions] == [1, 3, 9]
    assert three.clicks[:1] == one.clicks
    assert nine.clicks[:3] == three.clicks
    for prediction in shown.predictions:
        assert all(mask[y, x] == bool(label) for x, y, label in prediction.clicks)
        intersection, union = prediction.masks & mask, prediction.masks | mask
        iou = intersection.sum((1, 2)) / union.sum((1, 2))
        np.testing.assert_allclose(prediction.iou, iou)


def text_boxes(figure, monkeypatch):
    """Returns (text, its box in pixels) for all texts of a figure."""
    drawn = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda t, *args: (drawn.append(t), draw(t, *args)))
    figure.canvas.draw()
    shown = [t for t in drawn if t.get_text() and t.get_visible()]
    return [(t.get_text(), t.get_window_extent()) for t in shown]


def scaled(factor, oracle=0.0):
    """Returns the evaluation with all IoUs multiplied by a factor."""
    result = copy.deepcopy(EVALUATION)
    for iou in (*result["clicks"].values(), result["box"]):
        iou["chosen"] *= factor
        iou["oracle"] = iou["chosen"] + oracle
    return result


def boxed_objects():
    """Returns the objects of a gallery of images of unusual sizes."""
    source = UnusualImages()
    rows = object_rows(measure_objects(Stub(), source, range(len(source)), None)[0])
    return list(gallery.predict_rows(Stub(), source, gallery.choose_rows(rows), None))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: curves.draw_curves(make_rows(1), [{"step": 10} | EVALUATION]),
        lambda: curves.draw_curves(make_rows(2000, 50), [{"step": 100_000} | EVALUATION]),
        lambda: curves.draw_clicks(EVALUATION),
        lambda: calibration.draw_calibration(EVALUATION),
        lambda: calibration.draw_calibration(TILED),
        lambda: calibration.draw_calibration(EVALUATION | {"calibration": {"1": [], "box": []}}),
        lambda: gallery.draw_gallery(boxed_objects()),
        lambda: curves.draw_clicks(scaled(0.0)),
        lambda: curves.draw_clicks(scaled(1.09)),
        lambda: curves.draw_clicks(scaled(0.02, 0.01)),
        lambda: qualitative.draw_objects(
            [
                qualitative.click_on_object(Stub(), *chosen)
                for chosen in qualitative.choose_objects(UnusualImages())
            ]
        ),
    ],
)
def test_texts_are_on_the_figure_and_do_not_overlap(draw, monkeypatch):
    figure = draw()
    boxes = text_boxes(figure, monkeypatch)
    assert len(boxes) > 5
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{one} and {other}"


def test_curves_of_a_run_without_a_finite_loss_show_its_evaluations():
    figure = curves.draw_curves([{"step": 1, "loss": None}], [EVALUATION | {"step": 1}])
    loss, iou = figure.axes
    assert (len(loss.lines), len(iou.lines)) == (0, 2)


def test_curves_with_nan_losses_can_be_drawn():
    nan_rows = [row | {"loss": float("nan")} for row in make_rows(3)]
    figure = curves.draw_curves(nan_rows, [{"step": 30} | EVALUATION])
    figure.canvas.draw()
