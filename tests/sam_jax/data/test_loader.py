"""Tests that batches do not depend on hosts or workers, and that masks match their image."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from sam_jax.data.example import BadSample, Example, Source
from sam_jax.data.loader import Loader
from sam_jax.data.segmentation_batch import Batch, SegmentationTransform
from sam_jax.data.sources.synthetic import SyntheticScenes
from sam_jax.masks import rle

CANVAS = (48, 56)


@dataclasses.dataclass(frozen=True)
class ColoredMasks(Source):
    """A source of images with one mask per color channel, which is 255 inside the mask."""

    size: tuple[int, int] = CANVAS
    count: int = 10
    bad: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    def name(self, index):
        return f"image {index}"

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample("broken image", f"image {index} cannot be read")
        rng = np.random.default_rng(index)
        image = np.zeros((*self.size, 3), np.uint8)
        for color in range(3):
            y, x = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in self.size)
            image[y[0] : y[1], x[0] : x[1], color] = 255
        image[: self.size[0] // 2, : self.size[1] // 3] = 255  # breaks all symmetries
        image[0, 0] = 0
        return Example(image=image, masks=[rle.encode(image[..., c] > 0) for c in range(3)])


@dataclasses.dataclass(frozen=True)
class ConstantSource(Source):
    """A source with the same example for every index."""

    pixels: np.ndarray
    masks: list
    count: int = 1

    def __len__(self):
        return self.count

    def name(self, index):
        return f"number {index}"

    def __getitem__(self, index):
        return Example(image=self.pixels, masks=self.masks)


def loader(source, **changes):
    transform_fields = {f.name for f in dataclasses.fields(SegmentationTransform)} & changes.keys()
    transform = {"canvas": CANVAS, "masks_per_image": 3} | {
        k: changes.pop(k) for k in transform_fields
    }
    fields = dict(indices=np.arange(len(source)), batch_size=4, seed=0) | changes
    return Loader(source=source, transform=SegmentationTransform(**transform), **fields)


def batch_of(source, step=0, **changes):
    return loader(source, **changes).batch(step)[0]


def unpack(batch):
    """Returns the masks 'b n h w', bool."""
    return np.unpackbits(batch.masks, axis=-1, count=batch.image.shape[2]).astype(bool)


def assert_same(actual, expected):
    """Asserts that batches are bitwise equal, and that the skipped samples are the same."""
    for a, b in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert actual[1] == expected[1]


# Content of a batch.


def test_shapes_and_types():
    batch = batch_of(SyntheticScenes((40, 50)), batch_size=2, masks_per_image=5)
    assert isinstance(batch, Batch)
    types = {field: (x.shape, x.dtype) for field, x in vars(batch).items() if x is not None}
    assert types == {
        "image": ((2, 48, 56, 3), np.uint8),
        "size": ((2, 2), np.int32),
        "image_id": ((2,), np.int32),
        "masks": ((2, 5, 48, 7), np.uint8),
        "mask_id": ((2, 5), np.int32),
        "valid": ((2, 5), bool),
    }
    assert batch.embedding is None


def test_packed_bits_are_the_masks_with_their_ids():
    batch = batch_of(ColoredMasks(), batch_size=10)
    masks = unpack(batch)
    for b, index in enumerate(batch.image_id):
        example = ColoredMasks()[index]
        np.testing.assert_array_equal(batch.image[b], example.image)
        assert batch.valid[b].all()
        assert sorted(batch.mask_id[b]) == [0, 1, 2]
        for n, mask in enumerate(batch.mask_id[b]):
            np.testing.assert_array_equal(masks[b, n], rle.decode(example.masks[mask]))


def test_the_canvas_width_need_not_be_a_multiple_of_eight():
    source = ColoredMasks(size=(20, 13))
    batch = batch_of(source, canvas=(20, 13))
    assert batch.masks.shape == (4, 3, 20, 2)
    for b, index in enumerate(batch.image_id):
        for n, mask in enumerate(batch.mask_id[b]):
            expected = rle.decode(source[index].masks[mask])
            np.testing.assert_array_equal(unpack(batch)[b, n], expected)
    assert not (batch.masks[..., 1] & 0b111).any()  # padding bits beyond the canvas


@pytest.mark.parametrize(
    ("size", "inside"),
    [((48, 56), (48, 56)), ((100, 50), (48, 24)), ((10, 40), (14, 56)), ((96, 97), (48, 49)),
     ((300, 7), (48, 1)), ((1, 900), (1, 56))],
)  # fmt: skip
def test_images_are_resized_to_the_canvas_and_padded_with_zeros(size, inside):
    image = np.full((*size, 3), 200, np.uint8)
    mask = np.add.outer(*map(np.arange, size)) < max(size) // 2
    batch = batch_of(ConstantSource(image, [rle.encode(mask)]), batch_size=1)
    h, w = inside
    np.testing.assert_array_equal(batch.size, [inside])
    assert (batch.image[0, :h, :w] == 200).all()
    assert not batch.image[0, h:].any()
    assert not batch.image[0, :, w:].any()
    masks = unpack(batch)[0, 0]
    assert not masks[h:].any()
    assert not masks[:, w:].any()
    expected = rle.decode_resized(rle.encode(mask), inside)
    np.testing.assert_array_equal(masks[:h, :w], expected)


# The order of images.


def test_an_epoch_has_every_image_once():
    """Loads 10 images in batches of 4, so that epochs end within a batch."""
    ids = np.concatenate([batch_of(ColoredMasks(), step).image_id for step in range(15)])
    epochs = ids.reshape(6, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (6, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 6  # the order changes with the epoch
    other = [batch_of(ColoredMasks(), step, seed=1).image_id for step in range(3)]
    assert np.concatenate(other)[:10].tolist() != epochs[0].tolist()


def test_only_the_given_indices_are_loaded():
    indices = np.array([1, 5, 6, 9])
    for step in range(3):
        batch = batch_of(ColoredMasks(), step, indices=indices)
        np.testing.assert_array_equal(np.sort(batch.image_id), indices)


def test_a_batch_may_span_several_epochs():
    ids = batch_of(ColoredMasks(), indices=np.array([2, 7, 8]), batch_size=12).image_id
    assert collections.Counter(ids.tolist()) == {2: 4, 7: 4, 8: 4}


# Hosts and workers.

BAD = ColoredMasks(count=12, bad=(1, 4, 5, 11))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_load_disjoint_rows_of_the_same_batch(hosts):
    changes = dict(batch_size=8, masks_per_image=2, flips=True, rot90=True)
    for step in (0, 1, 7, 1000):
        full = loader(BAD, **changes).batch(step)
        parts = [loader(BAD, **changes, host=h, hosts=hosts).batch(step) for h in range(hosts)]
        assert all(len(batch.image) == 8 // hosts for batch, _ in parts)
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *[batch for batch, _ in parts])
        assert_same((joined, [p for _, skipped in parts for p in skipped]), full)


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 1), (0, 2), (0, 8), (2, 2)])
def test_prefetching_does_not_change_batches(workers, prefetch):
    source = SyntheticScenes((40, 50), count=9)  # other processes can import this class
    for host in (0, 1) if not workers else (1,):
        reference = loader(source, host=host, hosts=2, rot90=True)
        ahead = list(reference.batches(3, 9, workers=workers, prefetch=prefetch))
        assert len(ahead) == 6
        for step, batch in zip(range(3, 9), ahead, strict=True):
            assert_same(batch, reference.batch(step))


def test_prefetching_returns_the_skipped_samples_of_each_batch():
    reference = loader(BAD)
    ahead = list(reference.batches(2, 8))
    for step, batch in zip(range(2, 8), ahead, strict=True):
        assert_same(batch, reference.batch(step))
    assert any(problems for _, problems in ahead)


def test_an_empty_range_of_steps_has_no_batches():
    assert list(loader(ColoredMasks()).batches(4, 4)) == []
    assert list(loader(ColoredMasks()).batches(4, 4, prefetch=0)) == []


def test_batches_do_not_depend_on_earlier_batches():
    reference = loader(BAD)
    later = [reference.batch(step) for step in (5, 2, 5)]
    assert_same(later[0], later[2])
    assert_same(later[1], loader(BAD).batch(2))


@pytest.mark.parametrize(("batch_size", "hosts"), [(4, 3), (2, 4), (7, 2)])
def test_hosts_must_share_a_batch_evenly(batch_size, hosts):
    with pytest.raises(ValueError, match=f"multiple of the {hosts} hosts; got {batch_size}"):
        loader(ColoredMasks(), batch_size=batch_size, hosts=hosts)


# Masks.


def bars(number, size=CANVAS):
    """Returns masks of one column each."""
    masks = [np.zeros(size, bool) for _ in range(number)]
    for column, mask in enumerate(masks):
        mask[:, column] = True
    return [rle.encode(mask) for mask in masks]


def test_masks_are_sampled_without_replacement():
    source = ConstantSource(np.zeros((*CANVAS, 3), np.uint8), bars(8))
    drawn = [batch_of(source, step, batch_size=1) for step in range(600)]
    ids = np.stack([batch.mask_id[0] for batch in drawn])
    assert all(batch.valid.all() for batch in drawn)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert scipy.stats.chisquare(np.bincount(ids.ravel(), minlength=8)).pvalue > 1e-3
    sets = collections.Counter(frozenset(row) for row in ids.tolist())
    assert len(sets) == 56  # all combinations of 3 of 8 masks
    assert scipy.stats.chisquare(list(sets.values())).pvalue > 1e-3


def test_images_of_a_batch_sample_masks_independently():
    """Checks that the sampled masks differ between rows and between seeds."""
    source = ConstantSource(np.zeros((*CANVAS, 3), np.uint8), bars(8), count=8)
    first, second = (batch_of(source, 3, batch_size=8, seed=seed) for seed in (0, 1))
    assert len({tuple(row) for row in first.mask_id.tolist()}) > 4
    assert first.mask_id.tolist() != second.mask_id.tolist()


def test_missing_masks_are_padded():
    source = ConstantSource(np.zeros((*CANVAS, 3), np.uint8), bars(2))
    batch = batch_of(source, batch_size=1, masks_per_image=5)
    np.testing.assert_array_equal(batch.valid, [[True, True, False, False, False]])
    assert sorted(batch.mask_id[0, :2]) == [0, 1]
    assert not batch.masks[0, 2:].any()
    assert not batch.mask_id[0, 2:].any()


def test_masks_of_more_than_90_percent_are_skipped():
    size = (20, 30)
    masks = [np.arange(600).reshape(size) < area for area in (540, 541, 600, 100)]
    source = ConstantSource(np.zeros((*size, 3), np.uint8), [rle.encode(mask) for mask in masks])
    batch = batch_of(source, batch_size=1, masks_per_image=4)
    np.testing.assert_array_equal(batch.valid, [[True, True, False, False]])
    assert sorted(batch.mask_id[0, :2]) == [0, 3]


def test_mask_areas_are_relative_to_the_image_not_to_the_canvas():
    """Uses an image that covers half of the canvas."""
    size = (48, 28)
    mask = np.ones(size, bool)
    half = np.arange(28) < np.full((48, 1), 14)
    source = ConstantSource(np.zeros((*size, 3), np.uint8), [rle.encode(mask), rle.encode(half)])
    batch = batch_of(source, batch_size=1)
    np.testing.assert_array_equal(batch.valid, [[True, False, False]])
    assert batch.mask_id[0, 0] == 1


def test_masks_without_pixels_on_the_canvas_are_skipped():
    """Uses a canvas that samples every tenth pixel, starting at index 5."""
    size = (480, 560)
    masks = [np.zeros(size, bool) for _ in range(4)]
    masks[0][15, 25] = True  # the center of a pixel of the canvas
    masks[1][14, 25] = masks[1][15, 24] = True
    masks[3][100:109, 200:205] = True  # 45 pixels, none at a center in x
    source = ConstantSource(np.zeros((*size, 3), np.uint8), [rle.encode(mask) for mask in masks])
    batch = batch_of(source, batch_size=1)
    np.testing.assert_array_equal(batch.valid, [[True, False, False]])
    assert batch.mask_id[0, 0] == 0
    expected = np.zeros(CANVAS, bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(unpack(batch)[0, 0], expected)


# Flips and rotations.

NEIGHBORS = np.ones((3, 3), bool)

SYMMETRIES = [
    lambda x, flip=flip, turns=turns: np.rot90(x[:, ::-1] if flip else x, turns)
    for flip in (False, True)
    for turns in range(4)
]


@pytest.mark.parametrize(
    ("flips", "rot90", "number"), [(False, False, 1), (False, True, 4), (True, True, 8)]
)
def test_flips_and_rotations_apply_to_image_and_masks_alike(flips, rot90, number):
    """Uses a square canvas with the longer side of the image, so that nothing is resized."""
    source = ColoredMasks(size=(40, 26), count=1)
    example, seen = source[0], collections.Counter()
    for step in range(120):
        batch = batch_of(source, step, batch_size=1, canvas=(40, 40), flips=flips, rot90=rot90)
        h, w = batch.size[0]
        image = batch.image[0, :h, :w]
        matches = [i for i, f in enumerate(SYMMETRIES) if np.array_equal(f(example.image), image)]
        assert len(matches) == 1
        transform = SYMMETRIES[matches[0]]
        seen[matches[0]] += 1
        for n, mask in enumerate(batch.mask_id[0]):
            expected = np.zeros((40, 40), bool)
            expected[:h, :w] = transform(rle.decode(example.masks[mask]))
            np.testing.assert_array_equal(unpack(batch)[0, n], expected)
    assert len(seen) == number
    if number > 1:
        assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_flips_alone_keep_the_sides():
    source = ColoredMasks(size=(40, 26), count=1)
    image, seen = source[0].image, set()
    for step in range(40):
        batch = batch_of(source, step, batch_size=1, canvas=(40, 40), flips=True)
        np.testing.assert_array_equal(batch.size, [[40, 26]])
        actual = batch.image[0, :40, :26]
        matches = [i for i, f in enumerate(SYMMETRIES) if np.array_equal(f(image), actual)]
        seen |= set(matches)
        for n, mask in enumerate(batch.mask_id[0]):
            expected = SYMMETRIES[matches[0]](image)[..., mask] > 0
            np.testing.assert_array_equal(unpack(batch)[0, n, :40, :26], expected)
    assert {0, 4} <= seen  # the identity, and a horizontal flip


@pytest.mark.parametrize("size", [(90, 160), (200, 120), (31, 17)])
def test_masks_match_their_image_when_it_is_resized(size):
    """Uses a canvas that is not square, on which rotated images have another size."""
    source = ColoredMasks(size=size, count=6)
    sizes = set()
    for step in range(5):
        batch = batch_of(source, step, flips=True, rot90=True)
        masks = unpack(batch)
        for b, (h, w) in enumerate(batch.size):
            sizes.add((int(h), int(w)))
            scale = min(48 / size[0], 56 / size[1]), min(48 / size[1], 56 / size[0])
            is_rotated = (h > w) != (size[0] > size[1])
            sides = (size[::-1] if is_rotated else size) * np.full(2, scale[int(is_rotated)])
            assert np.abs(sides - [h, w]).max() <= 0.5
            for n in np.flatnonzero(batch.valid[b]):
                expected = batch.image[b, :, :, batch.mask_id[b, n]] >= 128
                # Edges differ by at most a pixel.
                assert not (expected & ~scipy.ndimage.binary_dilation(masks[b, n], NEIGHBORS)).any()
                assert not (scipy.ndimage.binary_erosion(masks[b, n], NEIGHBORS) & ~expected).any()
    assert len(sizes) == 2


# Unusable samples.


def test_a_bad_sample_is_reported_and_replaced():
    replaced = collections.Counter()
    for step in range(9):
        batch, problems = loader(BAD).batch(step)
        assert batch.image.shape[0] == 4
        assert not set(batch.image_id.tolist()) & set(BAD.bad)
        for problem in problems:
            assert problem.index in BAD.bad
            assert problem.name == f"image {problem.index}"
            assert problem.reason == "broken image"
            assert f"image {problem.index} cannot be read" in problem.detail
        replaced.update(problem.index for problem in problems)
    # Each bad sample occurs in all three epochs of 12 images, and replacements may also be bad.
    assert set(replaced) == set(BAD.bad)
    assert min(replaced.values()) >= 3


def test_bad_samples_do_not_change_the_order_of_good_samples():
    good = dataclasses.replace(BAD, bad=())
    for step in range(6):
        batch, problems = loader(BAD).batch(step)
        expected = loader(good).batch(step)[0]
        kept = [index not in BAD.bad for index in expected.image_id]
        np.testing.assert_array_equal(batch.image_id[kept], expected.image_id[kept])
        np.testing.assert_array_equal(batch.masks[kept], expected.masks[kept])
        assert len(problems) >= kept.count(False)


def test_replacements_vary():
    source = ColoredMasks(count=40, bad=tuple(range(20)))
    replacements = collections.defaultdict(set)
    for step in range(60):
        expected = batch_of(dataclasses.replace(source, bad=()), step).image_id
        actual = batch_of(source, step).image_id
        for before, after in zip(expected.tolist(), actual.tolist(), strict=True):
            if before in source.bad:
                replacements[before].add(after)
    assert np.mean([len(found) for found in replacements.values()]) > 3


@pytest.mark.parametrize(
    ("masks", "reason", "detail"),
    [
        ([], "no masks", "none of 0 masks"),
        ([np.ones((20, 30), bool), np.zeros((20, 30), bool)], "no masks", "none of 2 masks"),
        ([{"size": [20, 30], "counts": [5]}], "broken mask", "600, got 5"),
        ([{"size": [20, 30], "counts": "4P"}], "broken mask", "cut short"),
    ],
)
def test_samples_without_usable_masks_are_skipped(masks, reason, detail):
    masks = [rle.encode(mask) if isinstance(mask, np.ndarray) else mask for mask in masks]
    good = ColoredMasks((20, 30), count=2)

    class Unusable(ColoredMasks):
        def __getitem__(self, index):
            return good[1] if index else Example(image=good[0].image, masks=masks)

    batch, problems = loader(Unusable((20, 30), count=2)).batch(0)
    assert batch.image_id.tolist() == [1] * 4
    assert {(problem.index, problem.reason) for problem in problems} == {(0, reason)}
    assert detail in problems[0].detail


def test_a_source_of_bad_samples_only_is_an_error():
    source = ColoredMasks(count=3, bad=(0, 1, 2))
    with pytest.raises(ValueError, match=r"no usable image .*image \d: .*cannot be read"):
        loader(source).batch(0)
    with pytest.raises(ValueError, match="no usable image"):
        list(loader(source).batches(0, 1))


def test_other_errors_are_not_hidden():
    class Faulty(ColoredMasks):
        def __getitem__(self, index):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loader(Faulty()).batch(0)


# Unusable masks of usable images.


@dataclasses.dataclass(frozen=True)
class WithSkippedMasks(ColoredMasks):
    """The same source, where annotations of some images were skipped."""

    partial: tuple[int, ...] = ()

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if index not in self.partial:
            return example
        problems = ["empty mask", "broken mask", "empty mask"]
        skipped = [BadSample(reason, f"mask {i}: bad") for i, reason in enumerate(problems)]
        return dataclasses.replace(example, skipped=skipped)


def test_images_with_skipped_masks_are_used_and_reported():
    source = WithSkippedMasks(bad=(3,), partial=(1, 4))
    order = np.array([4, 3, 1, 0])
    load = loader(source, indices=order, batch_size=4)
    plain = loader(ColoredMasks(bad=(3,)), indices=order, batch_size=4)
    for step, (batch, skipped) in enumerate(load.batches(0, 3)):
        assert_same((batch, [s for s in skipped if not s.skipped_masks]), plain.batch(step))
        partial = {s.index for s in skipped if s.skipped_masks}
        assert partial == set(batch.image_id.tolist()) & {1, 4}
        assert skipped == load.batch(step)[1]
    one = next(s for s in skipped if s.skipped_masks)
    assert (one.reason, one.detail) == ("empty mask", "mask 0: bad")
    assert one.skipped_masks == {"broken mask": 1, "empty mask": 2}
