"""Weights in fewer bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sam_jax
from sam_jax.model.init import init_variables
from sam_jax.weights import safetensors_file
from sam_jax.weights.compact import pack, quantize, unpack
from sam_jax.weights.tensors import WeightsError

ARRAYS = {
    "kernel": np.random.default_rng(0).normal(size=(80, 64)).astype(np.float32),
    "bias": np.arange(5000, dtype=np.float32),
    "gaussian": np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32),
}


@pytest.mark.parametrize(("storage", "dtype"), [("float16", np.float16), ("int8", np.int8)])
def test_only_large_matrices_lose_precision(storage, dtype):
    packed = pack(ARRAYS, storage)
    assert packed["kernel"].dtype == dtype
    unpacked = unpack(packed, "file")
    assert unpacked.keys() == ARRAYS.keys()
    for name in ("bias", "gaussian"):
        np.testing.assert_array_equal(unpacked[name], ARRAYS[name])
    error = np.abs(unpacked["kernel"] - ARRAYS["kernel"]).max()
    assert 0 < error < 0.02
    assert all(array.dtype == np.float32 for array in unpacked.values())


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(1e-6, 1e6))
def test_the_error_is_at_most_half_a_scale(seed, channels, size):
    rng = np.random.default_rng(seed)
    array = (size * rng.normal(size=(7, 3, channels))).astype(np.float32)
    array[..., 0] = 0
    integers, scale = quantize(array)
    error = np.abs(integers * scale - array)
    assert (error <= scale / 2 * (1 + 1e-4)).all()
    assert (integers[..., 0] == 0).all()


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_weights_directory_of_any_storage_loads_as_float32(tmp_path, storage):
    model = sam_jax.sam_tiny()
    variables = init_variables(model, 0)
    sam_jax.save(tmp_path / "full", model, variables)
    sam_jax.save(tmp_path / "small", model, variables, storage=storage)
    sizes = [(tmp_path / n / "weights.safetensors").stat().st_size for n in ("small", "full")]
    assert sizes[0] < {"float16": 0.6, "int8": 0.4}[storage] * sizes[1]
    loaded_model, loaded = sam_jax.load(tmp_path / "small")
    assert loaded_model == model
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    logits = []
    for values in (variables, loaded):
        predictor = sam_jax.SamPredictor(model, values)
        predictor.set_image(image)
        logits.append(predictor.predict(box=np.array([10, 10, 40, 50]), return_logits=True)[0])
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05 * np.abs(logits[0]).max())


def test_bad_values_and_arguments_are_errors(tmp_path, without_type_checks):
    model = sam_jax.sam_tiny()
    variables = init_variables(model, 0)
    with pytest.raises(ValueError, match="storage must be one of float32, float16, int8; got 'i4'"):
        sam_jax.save(tmp_path / "w", model, variables, storage="i4")
    with pytest.raises(ValueError, match="storage must be float32 unless"):
        sam_jax.save(tmp_path / "w.pth", model, variables, storage="int8")
    for storage in ("float16", "int8"):
        with pytest.raises(WeightsError, match=f"kernel has values that {storage} cannot store"):
            pack({"kernel": np.full((64, 64), np.inf, np.float32)}, storage)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["scale", "integers", "dtype"])
def test_incomplete_integers_are_errors(tmp_path, damage):
    model = sam_jax.sam_tiny()
    sam_jax.save(tmp_path / "w", model, init_variables(model, 0), storage="int8")
    path = tmp_path / "w" / "weights.safetensors"
    arrays = safetensors_file.read(path)
    name = next(name for name in arrays if arrays[name].dtype == np.int8)
    if damage == "scale":
        del arrays[f"{name}:scale"]
    elif damage == "integers":
        del arrays[name]
    else:
        arrays[name] = arrays[name].astype(np.int16)
    safetensors_file.write(path, arrays)
    path.with_name("SHA256SUMS").unlink()
    with pytest.raises(WeightsError, match=r"must hold float32 and float16 arrays"):
        sam_jax.load(tmp_path / "w")
