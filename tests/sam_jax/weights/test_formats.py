"""Tests loading and saving in every format, and replacing existing files."""

import logging
import os
import random
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sam_jax.io import atomic
from sam_jax.model.sam import replace_fields, sam_tiny
from sam_jax.predict.predictor import SamPredictor
from sam_jax.weights import download, formats, safetensors_file, torch_file
from sam_jax.weights.convert import to_huggingface, to_torch
from sam_jax.weights.formats import convert_file, load, read, save
from sam_jax.weights.tensors import WeightsError
from tests.sam_jax.weights.official_state import assert_same_variables
from tests.sam_jax.weights.safetensors_bytes import mutated


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Changes to an empty working folder, and returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(path="."):
    """Returns all files below a folder, including hidden ones."""
    return sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file())


# Formats.


@pytest.mark.parametrize(
    "name", ["w.pth", "w.pt", "w.safetensors", "weights", "w.v1", "a/b/weights"]
)
def test_weights_round_trip_through_every_format(square, name):
    save(name, *square)
    model, variables = load(name)
    assert model == square[0]
    assert_same_variables(variables, square[1])
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "weights"])
def test_models_of_images_that_are_not_square_round_trip(tiny, name):
    save(name, *tiny)
    model, variables = load(name)
    assert model == tiny[0]
    assert_same_variables(variables, tiny[1])


def test_paths_and_options_determine_the_format(square):
    for name in ("w.pth", "w.pt", "other"):
        save(name, *square, format="official")
        assert Path(name).read_bytes()[:2] == b"PK"
        assert torch_file.read(name).keys() == to_torch(*square).keys()
    save(Path("w.safetensors"), *square)
    assert safetensors_file.read("w.safetensors").keys() == to_torch(*square).keys()
    save("directory", *square)
    files = ["SHA256SUMS", "model.json", "weights.safetensors"]
    assert listing("directory") == files
    save("directory.pth", *square, format="sam_jax")
    assert listing("directory.pth") == files
    save("hf", *square, format="huggingface")
    assert listing("hf") == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert safetensors_file.read("hf/model.safetensors").keys() == to_huggingface(*square).keys()
    for name in ("other", "hf", "directory.pth"):
        assert_same_variables(load(name)[1], square[1])


def test_a_weights_directory_keeps_all_fields(tiny):
    model = replace_fields(tiny[0], dtype="bfloat16", dropout=0.1, drop_path=0.4, remat="blocks")
    save("w", model, tiny[1])
    assert load("w")[0] == model


def test_safetensors_are_recognized_by_content(square):
    safetensors_file.write("w.bin", to_torch(*square))
    assert_same_variables(load("w.bin")[1], square[1])


def test_a_conversion_names_what_its_format_does_not_store(square):
    save("w", replace_fields(square[0], object_share=(0.25, 0.75)), square[1])
    assert convert_file("w", "copy") == []
    for target, format in (("w.pth", None), ("hf", "huggingface")):
        (note,) = convert_file("w", target, format)
        assert note.startswith("object_share is not stored in this format")
        assert load(target)[0].object_share is None


def test_files_with_huggingface_names_are_loaded(square):
    safetensors_file.write("w.safetensors", to_huggingface(*square))
    assert_same_variables(load("w.safetensors")[1], square[1])
    torch_file.write("w.pth", to_huggingface(*square))
    assert_same_variables(load("w.pth")[1], square[1])


def test_variables_are_saved_as_float32(tiny):
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tiny[1])
    for name in ("w", "w.pth", "w.safetensors"):
        save(name, tiny[0], half)
        assert_same_variables(load(name)[1], jax.tree.map(lambda x: x.astype(np.float32), half))


def test_an_unknown_format_is_refused(tiny, folder):
    message = r"format must be one of sam_jax, official, huggingface; got 'npz'"
    with pytest.raises(ValueError, match=message):
        save("w", *tiny, format="npz")
    assert listing() == []


def test_the_error_of_a_missing_path_lists_the_possible_ones():
    message = r"no weights at missing.pth: .*directory.*\.pth.*safetensors.*Hugging.*sam_vit_b"
    with pytest.raises(FileNotFoundError, match=message):
        load("missing.pth")
    with pytest.raises(FileNotFoundError, match=r"sam_phot \(did you mean sam_photo\?\): "):
        load("sam_phot")


def test_a_tilde_stands_for_the_home_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save("~/w", *tiny)
    assert (tmp_path / "home/w/model.json").is_file()
    assert load("~/w")[0] == tiny[0]
    save("~/w.pth", *tiny)
    assert load(Path("~/w.pth"))[0] == tiny[0]
    with pytest.raises(FileNotFoundError, match="no weights at ~nobody_of_this_name/w"):
        load("~nobody_of_this_name/w")


def test_official_names_are_downloaded(square, monkeypatch):
    fetched = []

    def fetch(name):
        fetched.append(name)
        return Path("cache.pth")

    monkeypatch.setattr(download, "fetch", fetch)
    save("cache.pth", *square)
    for name in ("sam_vit_b", "sam_vit_l", "sam_vit_h"):
        assert load(name)[0] == square[0]
    assert fetched == ["sam_vit_b", "sam_vit_l", "sam_vit_h"]
    # A directory of that name takes precedence.
    save("sam_vit_b", *square)
    load("sam_vit_b")
    assert len(fetched) == 3


def test_notes_are_logged_as_warnings(square, caplog):
    tensors = to_torch(*square)
    tensors["image_encoder.pos_embed"] = np.ones((1, 4, 4, 24), np.float32)
    torch_file.write("w.pth", tensors)
    notes = read("w.pth").notes
    assert len(notes) == 2
    with caplog.at_level(logging.WARNING, logger="sam_jax"):
        load("w.pth")
    assert [record.getMessage() for record in caplog.records] == [
        f"w.pth: {note}" for note in notes
    ]


def test_other_files_are_refused(square):
    Path("text.pth").write_text("hello, world")
    with pytest.raises(ValueError, match=r"text.pth"):
        load("text.pth")
    Path("empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.pth"):
        load("empty.pth")
    Path("empty.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.safetensors"):
        load("empty.safetensors")
    os.mkdir("empty")
    with pytest.raises(ValueError, match=r"empty.*model.json.*model.safetensors"):
        load("empty")


# Replacing existing files.


def test_a_weights_directory_replaces_an_older_one(tiny, square):
    save("w", *square)
    Path("w/notes.txt").write_text("of the older one")
    save("w", *tiny)
    assert load("w")[0] == tiny[0]
    assert listing() == ["w/SHA256SUMS", "w/model.json", "w/weights.safetensors"]
    os.mkdir("empty")
    save("empty", *tiny)
    assert load("empty")[0] == tiny[0]


def test_a_huggingface_folder_replaces_an_older_one(square):
    save("w", *square, format="huggingface")
    save("w", *square, format="huggingface")
    assert len(listing()) == 3


@pytest.mark.parametrize("format", ["sam_jax", "huggingface"])
def test_other_directories_and_files_are_not_replaced(square, format):
    os.mkdir("photos")
    Path("photos/a.jpg").write_text("precious")
    Path("file").write_text("precious")
    for name in ("photos", "file"):
        with pytest.raises(FileExistsError, match=rf"{name} exists and has no .*json"):
            save(name, *square, format=format)
    assert listing() == ["file", "photos/a.jpg"]
    # A directory of one format does not replace one of the other format.
    save("other", *square, format="huggingface" if format == "sam_jax" else "sam_jax")
    with pytest.raises(FileExistsError, match=r"other exists and has no"):
        save("other", *square, format=format)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_does_not_replace_a_directory(square, name):
    os.makedirs(f"{name}/photos")
    with pytest.raises(OSError, match=name):
        save(name, *square)
    assert os.listdir() == [name]


WRITERS = {
    "w": [(safetensors_file, "write"), (atomic, "write_json"), (os, "replace"), (Path, "rename")],
    "w.pth": [(torch_file, "_write"), (os, "replace")],
    "w.safetensors": [(safetensors.numpy, "save_file"), (os, "replace")],
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_older_weights(tiny, square, monkeypatch, name, error):
    save(name, *square)
    before = listing()
    for owner, function in WRITERS[name]:

        def fail(*args, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            with pytest.raises(type(error)):
                save(name, *tiny)
        assert listing() == before, function
        assert os.listdir() == [name], function
        assert_same_variables(load(name)[1], square[1])


def test_a_failed_rename_restores_the_older_weights(tiny, square, monkeypatch):
    save("w", *square)
    rename, calls = Path.rename, []

    def fail_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_second)
        with pytest.raises(OSError, match="disk full"):
            save("w", *tiny)
    assert load("w")[0] == square[0]
    assert os.listdir() == ["w"]


def test_variables_of_another_model_are_not_written(tiny, square):
    for name in ("w", "w.pth", "w.safetensors"):
        for variables in (square[1], {"params": tiny[1]["params"]}, {}):
            with pytest.raises(ValueError, match="variables"):
                save(name, tiny[0], variables)
    with pytest.raises(ValueError, match=r"square images only; got \(48, 72\)"):
        save("w", *tiny, format="huggingface")
    assert os.listdir() == []


def test_the_tiny_model_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = read("sam_tiny")
    assert (checkpoint.kind, checkpoint.model) == ("sam", sam_tiny())
    assert checkpoint.notes == []
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint.variables))
    assert sum(path.stat().st_size for path in formats.PACKAGED["sam_tiny"].iterdir()) <= 4e6


@pytest.mark.parametrize(("name", "max_bytes"), [("sam_nuclei", 2e6), ("sam_photo", 30e6)])
def test_models_of_real_images_come_with_the_package(tmp_path, monkeypatch, name, max_bytes):
    monkeypatch.chdir(tmp_path)
    model, variables = load(name)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))
    assert sum(path.stat().st_size for path in formats.PACKAGED[name].iterdir()) <= max_bytes
    # A bright disk on a dark ground is segmented from its box.
    y, x = np.mgrid[:60, :60]
    disk = (y - 30) ** 2 + (x - 27) ** 2 <= 12**2
    image = np.where(disk[..., None], (150, 150, 150), (10, 10, 10)).astype(np.uint8)
    predictor = SamPredictor(model, variables)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(box=np.array([15, 18, 39, 42]))
    assert predictor.tiles_used[0].height < 60
    mask = masks[scores.argmax()]
    assert (mask & disk).sum() / (mask | disk).sum() > 0.8


@pytest.mark.parametrize("name", ["tiny.pth", "tiny.safetensors", "tiny"])
def test_official_formats_require_eight_decoder_heads(tmp_path, name):
    model, variables = load("sam_tiny")
    format = None if "." in name else "huggingface"
    with pytest.raises(WeightsError, match=r"only models with mask_decoder.num_heads=8 .* got 2"):
        save(tmp_path / name, model, variables, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_mutated_weights_files_are_loaded_or_refused(tiny, monkeypatch):
    """Checks that mutated files are loaded, or refused with a ValueError that names them."""
    monkeypatch.setattr(jax, "device_put", lambda x: x)
    for name in ("w.pth", "w.safetensors"):
        save(name, *tiny)
        file = Path(name).read_bytes()
        start, end = file[:30_000], file[-30_000:]
        for seed in range(60):
            rng = random.Random(seed)
            middle = file[30_000:-30_000]
            both = (mutated(start, rng), end) if seed % 2 else (start, mutated(end, rng))
            Path(name).write_bytes(both[0] + middle + both[1])
            try:
                model, _ = load(name)
            except ValueError as error:
                assert name in str(error)  # noqa: PT017 - or it loads
            else:
                assert model == tiny[0]
