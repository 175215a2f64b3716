"""Prediction in tiles, with the model that comes with the package, whose canvas is 64 x 64."""

import logging

import jax
import numpy as np
import pytest
from PIL import Image

import sam_jax
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.images.resize import fit_size, resize_and_pad
from sam_jax.masks.overlap import mask_iou
from sam_jax.predict.tile_embedder import TileEmbedder, read_tile
from sam_jax.predict.tile_masks import OUTSIDE_LOGIT
from sam_jax.predict.tiles import MASK_SHARE, Tile, plan_pyramid, tile_for_box

CANVAS = (64, 64)
CLICK = {"point_coords": np.array([[150.0, 90.0]]), "point_labels": np.array([1])}
CLICKS = {"point_coords": np.array([[30, 20], [40, 31]]), "point_labels": [1, 0]}
BOX = {"box": np.array([105, 96, 140, 110])}
LARGE_BOX = {"box": np.array([5, 6, 190, 150])}
SCENE = SyntheticScenes((160, 200)).image(3)


class CountingMemmap(np.memmap):
    """A mapped file that counts the bytes of the slices that are taken from it."""

    def __getitem__(self, index):
        result = super().__getitem__(index)
        CountingMemmap.read += result.nbytes
        return result.view(np.ndarray)


@pytest.fixture(scope="module")
def predictor():
    return sam_jax.SamPredictor(*sam_jax.load("sam_tiny"))


@pytest.fixture
def tiled(predictor):
    predictor.set_image(SCENE, tiles="auto")
    return predictor


@pytest.fixture
def huge(tmp_path):
    """A sparse file of 20,000 x 20,000 pixels."""
    path = tmp_path / "huge.raw"
    shape = (20_000, 20_000, 3)
    with path.open("wb") as file:
        file.truncate(int(np.prod(shape)))
    CountingMemmap.read = 0
    return CountingMemmap(path, np.uint8, "r", shape=shape)


def assert_equal(prediction, expected):
    for a, b in zip(prediction, expected, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("image", "tiles"), [(SCENE[:4, :3], "auto"), (SCENE, 200), (SCENE, 1000), (SCENE, None)]
)
def test_one_tile_equals_no_tiles(predictor, image, tiles):
    inside = {"point_coords": [[11.0, 12]], "point_labels": [1]}
    predictor.set_image(image)
    _, _, logits = predictor.predict(**inside)
    prompts = [inside, {"box": [3, 4, 12, 14]}, inside | {"mask_input": logits[:1]}, {}]
    expected = predictor.predict_many(prompts, return_logits=True)
    embedding, size = predictor.get_image_embedding(), predictor.input_size
    predictor.set_image(image, tiles=tiles)
    assert_equal(predictor.predict_many(prompts, return_logits=True), expected)
    assert predictor.tiles_used == [Tile(0, 0, *image.shape[:2])] * 4
    assert np.array_equal(predictor.get_image_embedding(), embedding)
    assert predictor.input_size == size


def test_an_object_in_a_tile_is_that_of_the_tile_as_an_image(predictor, tiled):
    prediction = tiled.predict(**BOX)
    (tile,) = tiled.tiles_used
    assert tile.width < 200
    predictor.set_image(np.ascontiguousarray(SCENE[tile.region]))
    masks, scores, low_res = predictor.predict(box=BOX["box"] - np.tile(tile.corner, 2))
    assert np.array_equal(prediction[0][:, *tile.region], masks)
    assert prediction[0].sum() == masks.sum()  # nothing outside of the tile
    assert_equal(prediction[1:], (scores, low_res))


def test_reversed_boxes_and_points_without_a_position_have_the_same_tile(tiled):
    corner, opposite = BOX["box"][:2], BOX["box"][2:]
    without_position = {"point_coords": [[0, 0]], "point_labels": [-1]}
    reversed_box = {"box": np.concatenate([opposite, corner])}
    empty_box = {"box": np.concatenate([corner, corner])}
    tiled.predict_many([BOX, reversed_box, BOX | without_position, empty_box, without_position])
    first, second, third, _, last = tiled.tiles_used
    assert first == second == third
    assert last.size == SCENE.shape[:2]


def test_the_default_tiles_depend_on_the_model(predictor, tiled):
    model = sam_jax.replace_fields(predictor.model, object_share=(0.25, 0.75))
    windows = sam_jax.SamPredictor(model, predictor.variables)
    windows.set_image(SCENE)
    assert_equal(windows.predict_many([BOX, CLICK]), tiled.predict_many([BOX, CLICK]))
    assert windows.tiles_used == tiled.tiles_used
    assert windows.tiles_used[0].height < 100
    windows.set_image(SCENE, tiles="none")
    entire = windows.predict_many([BOX, CLICK])
    predictor.set_image(SCENE)
    assert_equal(entire, predictor.predict_many([BOX, CLICK]))
    assert [tile.size for tile in windows.tiles_used] == [(160, 200)] * 2


def test_batches_of_images_in_tiles_equal_single_ones(predictor):
    model = sam_jax.replace_fields(predictor.model, object_share=(0.25, 0.75))
    windows = sam_jax.SamPredictor(model, predictor.variables)
    images, prompts = [SCENE, SCENE[::-1]], [[BOX, CLICK], [BOX]]
    batch = windows.predict_batch(images, prompts)
    for actual, image, image_prompts in zip(batch, images, prompts, strict=True):
        predictor.set_image(image, tiles="auto")
        assert_equal(actual, predictor.predict_many(image_prompts))
    assert not windows.is_image_set
    (entire,) = windows.predict_batch([SCENE], [[BOX]], tiles="none")
    assert_equal(entire, predictor.predict_batch([SCENE], [[BOX]])[0])
    corrected = [BOX | {"mask_input": entire[2][0][:1]}]
    with pytest.raises(ValueError, match="mask_input must be None in a batch with tiles"):
        windows.predict_batch([SCENE], [corrected])


def test_objects_do_not_depend_on_others(predictor):
    prompts = [CLICK, BOX, CLICKS, LARGE_BOX, CLICKS | BOX, {}]
    predictor.set_image(SCENE, tiles="auto")
    together = predictor.predict_many(prompts, return_logits=True)
    tiles = predictor.tiles_used
    assert len(set(tiles)) >= 3
    assert tiles[-1] == Tile(0, 0, 160, 200)
    predictor.set_image(SCENE, tiles="auto")
    for i, prompt in reversed(list(enumerate(prompts))):
        alone = predictor.predict(**prompt, return_logits=True)
        assert predictor.tiles_used == [tiles[i]]
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b[i], atol=1e-4)


def test_pixels_outside_of_a_tile(tiled):
    logits, _, _ = tiled.predict(**BOX, return_logits=True, multimask_output=False)
    inside = np.zeros((160, 200), bool)
    inside[tiled.tiles_used[0].region] = True
    assert logits.shape == (1, 160, 200)
    assert (logits[0, ~inside] == OUTSIDE_LOGIT).all()
    assert (logits[0, inside] > OUTSIDE_LOGIT).all()


@pytest.mark.parametrize("return_logits", [False, True])
def test_masks_of_tiles_are_those_of_the_image(tiled, return_logits):
    prompts = [CLICK, BOX, LARGE_BOX]
    masks, scores, low_res = tiled.predict_many(prompts, return_logits=return_logits)
    for i, prediction in enumerate(tiled.predict_tiles(prompts, return_logits=return_logits)):
        assert prediction.tile == tiled.tiles_used[i]
        assert prediction.masks.shape == (3, *prediction.tile.size)
        assert np.array_equal(prediction.masks, masks[i][:, *prediction.tile.region])
        assert_equal((prediction.scores, prediction.low_res_logits), (scores[i], low_res[i]))


def test_no_prompts_give_empty_results(tiled):
    masks, scores, low_res = tiled.predict_many([])
    assert (masks.shape, scores.shape, low_res.shape) == ((0, 3, 160, 200), (0, 3), (0, 3, 32, 32))
    assert tiled.predict_tiles([]) == []


def test_a_side_gives_tiles_of_this_side_and_the_image(predictor):
    predictor.set_image(SCENE, tiles=80)
    predictor.predict_many([BOX, LARGE_BOX])
    assert [tile.size for tile in predictor.tiles_used] == [(80, 80), (160, 200)]


@pytest.mark.parametrize(
    "box", [(20, 30, 29, 42), (90, 70, 115, 85), (100, 60, 145, 100), (15, 20, 120, 140)]
)
def test_a_click_is_answered_in_the_tile_that_fits_its_mask(predictor, monkeypatch, box):
    """Checks it for a decoder that always finds the object in `box`."""

    def find_object(model, variables, tile, prompts, multimask_output):
        y, x = (np.mgrid[:32, :32] + 0.5) * max(tile.size) / 32
        is_inside = (abs(x + tile.left - (box[0] + box[2]) / 2) < (box[2] - box[0]) / 2) & (
            abs(y + tile.top - (box[1] + box[3]) / 2) < (box[3] - box[1]) / 2
        )
        logits = np.where(is_inside, 5, -5).astype(np.float32)
        return [(logits[None, None], np.ones((1, 1), np.float32))]

    predictor.set_image(SCENE, tiles="auto")
    monkeypatch.setattr("sam_jax.predict.tiled_image.decode_objects", find_object)
    monkeypatch.setattr(TileEmbedder, "embed", lambda self, tiles: tiles)
    click = {"point_coords": [[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]], "point_labels": [1]}
    predictor.predict(**click, multimask_output=False)
    pyramid = plan_pyramid(SCENE.shape[:2], CANVAS, "auto")
    points = np.array(click["point_coords"])
    expected = tile_for_box(pyramid, np.array(box, np.float64), points, MASK_SHARE)
    assert predictor.tiles_used == [expected]


def test_a_click_inside_stays_in_the_tile_and_one_outside_leads_to_a_larger_one(tiled):
    _, _, logits = tiled.predict(**BOX, multimask_output=False)
    (tile,) = tiled.tiles_used
    x, y = tile.left + 3, tile.top + 4
    inside = {"point_coords": [[x, y]], "point_labels": [0], "mask_input": logits}
    tiled.predict(**inside, multimask_output=False)
    assert tiled.tiles_used == [tile]
    outside = {"point_coords": [[tile.left - 4, y]], "point_labels": [1], "mask_input": logits}
    _, _, logits = tiled.predict(**outside, multimask_output=False)
    (larger,) = tiled.tiles_used
    assert larger.height * larger.width > tile.height * tile.width
    assert larger.left <= tile.left - 4
    tiled.predict(mask_input=logits)
    assert tiled.tiles_used == [larger]


def test_a_moved_mask_input_still_shows_the_object(tiled):
    """Checks that the mask after a click far away overlaps with the mask before."""
    masks, _, logits = tiled.predict(**BOX, multimask_output=False)
    (tile,) = tiled.tiles_used
    far = {"point_coords": [[tile.left - 4, tile.top]], "point_labels": [0]}
    moved, _, _ = tiled.predict(**far, mask_input=logits, multimask_output=False)
    without, _, _ = tiled.predict(**far, multimask_output=False)
    assert mask_iou(moved[0], masks[0]) > mask_iou(without[0], masks[0])


def test_the_mask_input_of_another_image_is_an_error(predictor, tiled):
    _, _, logits = tiled.predict(**BOX, multimask_output=False)
    tiled.predict(mask_input=logits)
    predictor.set_image(SCENE[::-1], tiles="auto")
    with pytest.raises(ValueError, match="an earlier prediction on this image"):
        predictor.predict(mask_input=logits)
    predictor.set_image(SCENE[::-1])
    predictor.predict(mask_input=logits)


def test_an_invalid_prompt_or_option_changes_nothing(tiled, without_type_checks):
    for tiles in ("x", 0, 64.0):
        with pytest.raises(ValueError, match="tiles must be None"):
            tiled.set_image(SCENE[:50], tiles=tiles)
    assert tiled.original_size == (160, 200)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: box must have shape"):
        tiled.predict_many([BOX, {"box": [9, 9, 30]}])


def test_no_image_size_compiles_a_program(predictor, caplog):
    prompts = [CLICK, BOX, CLICKS]
    predictor.set_image(SCENE, tiles="auto")
    for n in (1, 2, 3):
        predictor.predict_many(prompts[:n])
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        for size in ((300, 170), (165, 431)):
            image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
            predictor.set_image(image, tiles="auto")
            predictor.predict_many(prompts)
    compilations = [r.getMessage() for r in caplog.records if "compil" in r.getMessage().lower()]
    assert compilations == []


def test_only_the_tile_of_a_box_is_read(predictor, huge):
    predictor.set_image(huge, tiles="auto")
    box = [15_000, 12_000, 15_100, 12_180]
    (prediction,) = predictor.predict_tiles([{"box": box}])
    height, width = prediction.tile.size
    assert 180 < width < 500
    assert prediction.masks.shape == (3, height, width)
    assert 0 < CountingMemmap.read <= height * width * 3


def test_embeddings_are_computed_once_and_the_oldest_are_dropped(predictor, monkeypatch):
    read = []

    def watch(image, tile, canvas, max_pixels):
        read.append(tile)
        return read_tile(image, tile, canvas, max_pixels)

    monkeypatch.setattr("sam_jax.predict.tile_embedder.read_tile", watch)
    a, b, c = (Tile(0, left, 64, 64) for left in (0, 50, 100))
    nbytes = 8 * 8 * 64 * 4
    embedder = TileEmbedder(predictor.model, predictor.variables, SCENE, cache_bytes=2 * nbytes + 1)
    first = [np.asarray(x) for x in embedder.embed([a, b])]
    assert_equal(embedder.embed([b, a]), first[::-1])
    assert read == [a, b]
    list(embedder.embed([c]))  # drops b
    list(embedder.embed([a]))
    assert read == [a, b, c]
    assert_equal(embedder.embed([b]), first[1:])
    assert read == [a, b, c, b]


def test_tiles_encoded_together_equal_single_ones(predictor, monkeypatch):
    tiles = [Tile(0, left, 64, 64) for left in range(0, 100, 10)]
    arguments = predictor.model, predictor.variables, SCENE
    single = [np.asarray(x) for x in TileEmbedder(*arguments).embed(tiles)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    together = list(TileEmbedder(*arguments, cache_bytes=1).embed(tiles))
    for a, b in zip(single, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("size", [(907, 1203), (640, 640), (2000, 130)])
def test_large_tiles_are_reduced_in_bands(size, monkeypatch):
    """As if resized at once, but for the filter; and the size on the canvas is the same."""
    monkeypatch.setattr("sam_jax.images.resize.BAND_PIXELS", 5000)
    small = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))
    tile = Tile(0, 0, *size)
    reduced = read_tile(image, tile, CANVAS, max_pixels=1000)
    assert reduced.shape[:2] == fit_size(size, CANVAS)
    expected, input_size = resize_and_pad(image, CANVAS)
    padded, same_size = resize_and_pad(reduced, CANVAS)
    assert same_size == input_size
    assert np.abs(padded.astype(int) - expected).max() <= 12
    assert np.abs(padded.astype(int) - expected).mean() < 1.5


def test_large_tiles_are_never_in_memory_at_once(huge, monkeypatch):
    sizes = []
    to_image = Image.fromarray

    def watch(pixels):
        sizes.append(pixels.size)
        return to_image(pixels)

    monkeypatch.setattr("sam_jax.images.resize.BAND_PIXELS", 1 << 18)
    monkeypatch.setattr(Image, "fromarray", watch)
    assert read_tile(huge, Tile(10, 20, 2900, 2000), CANVAS, 1 << 20).shape == (64, 44, 3)
    assert sum(sizes[:-1]) == 2900 * 2000 * 3
    assert max(sizes) < 2 * 3 << 18


def test_the_whole_of_a_pyramid_is_its_last_level():
    pyramid = plan_pyramid((20_000, 15_000), CANVAS, "auto")
    assert pyramid.image_tile == Tile(0, 0, 20_000, 15_000)
    assert pyramid.scales[-1] == 20_000 / 64
