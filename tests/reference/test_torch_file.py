"""Checks that torch and `sam_jax.weights.torch_file` read each other's files bitwise."""

import argparse
import collections
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from sam_jax.weights import torch_file

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
SHAPES = [(), (0,), (0, 3), (1,), (5,), (2, 3), (3, 1, 2, 5)]


def random_tensor(dtype, shape) -> "torch.Tensor":
    """Returns a tensor of random bits, which include NaNs and subnormal numbers."""
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(high, (int(np.prod(shape)) * size,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def assert_same_bits(array: np.ndarray, tensor: "torch.Tensor") -> None:
    assert array.dtype == DTYPES[tensor.dtype]
    assert array.shape == tuple(tensor.shape)
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert array.tobytes() == bits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth"


def mixed_tensors() -> dict[str, "torch.Tensor"]:
    return {f"{d}{shape}": random_tensor(d, shape) for d in DTYPES for shape in SHAPES}


def test_reads_every_dtype_and_shape(path):
    tensors = mixed_tensors()
    torch.save(tensors, path)
    read = torch_file.read(path)
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(read[name], tensor)


def test_torch_reads_every_dtype_and_shape(path):
    tensors = mixed_tensors()
    torch.save(tensors, path)
    arrays = torch_file.read(path)
    torch_file.write(path, arrays)
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert type(loaded) is OrderedDict
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].is_contiguous()
            assert_same_bits(arrays[name], loaded[name])


def test_reads_views(path):
    base = torch.randn(4, 6, 5)
    tied = torch.nn.Parameter(torch.randn(3, 2))
    tensors = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:3, ::2, 4],
        "empty": base[4:],
        "unfolded": torch.arange(6).as_strided((2, 3), (3, 1)),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied": tied,
        "tied too": tied,
        "expanded by one": torch.randn(3).expand(1, 3),
    }
    torch.save(tensors, path)
    read = torch_file.read(path)
    for name, tensor in tensors.items():
        assert_same_bits(read[name], tensor)
    assert np.shares_memory(read["base"], read["sliced"])
    assert np.shares_memory(read["tied"], read["tied too"])


def test_a_module_round_trips_through_torch(path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).bfloat16()
    torch.save(module.state_dict(), path)
    read = torch_file.read(path)
    torch_file.write(path, read)
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).bfloat16()
    other.load_state_dict(torch.load(path, weights_only=True))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_reads_a_training_checkpoint(path):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(lr=1e-3, resume="", device="cuda", betas=(0.9, 0.95), seed=1 << 40)
    content = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "weight": torch.nn.Parameter(torch.ones(2)),
        "epoch": 799,
        "args": args,
        "best": None,
    }
    torch.save(content, path)
    read = torch_file.read(path)
    assert (read["epoch"], read["best"], read["args"]) == (799, None, vars(args))
    assert_same_bits(read["weight"], content["weight"])
    for name, tensor in module.state_dict().items():
        assert_same_bits(read["model"][name], tensor)
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            assert_same_bits(read["optimizer"]["state"][index][name], tensor)
    assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear Linear"),
        (torch.zeros(1).expand(9), "expanded"),
    ],
    ids=["module", "expanded"],
)
def test_unsupported_values_are_refused(path, value, message):
    torch.save({"value": value}, path)
    with pytest.raises(torch_file.TorchFileError, match=message):
        torch_file.read(path)


SKIPPED = {
    "collections Counter": collections.Counter("abca"),
    "torch Size": torch.Size([1, 2]),
    "torch device": torch.device("cuda:1"),
    "torch bfloat16": torch.bfloat16,
    "torch quint8": torch.quint8,
    "__builtin__ set": {1, 2},
    "_codecs encode": b"abc",
    "__builtin__ bytearray": bytearray(b"abc"),
    "__builtin__ complex": 1j,
    "builtins int": 1 << 200,
    "torch.serialization _get_layout": torch.strided,
    "torch ComplexFloatStorage": torch.zeros(2, dtype=torch.complex64),
    "torch._utils _rebuild_tensor_v3": torch.zeros(2, dtype=torch.uint16),
    "torch._utils _rebuild_sparse_tensor": torch.eye(2).to_sparse(),
    "torch LongTensor": torch.LongTensor,
}


@pytest.mark.parametrize("name", SKIPPED)
def test_other_values_that_torch_reads_are_skipped(path, name):
    torch.save({"value": SKIPPED[name], "weight": torch.ones(2)}, path)
    torch.load(path, weights_only=True)
    read = torch_file.read(path)
    assert read["value"] == torch_file.Global(name)
    assert_same_bits(read["weight"], torch.ones(2))


def test_numpy_values_are_skipped(path):
    torch.save({"score": np.float64(1), "array": np.ones((2, 3)), "weight": torch.ones(2)}, path)
    read = torch_file.read(path)
    assert read["score"].name.endswith("multiarray scalar")
    assert read["array"].name.endswith("multiarray _reconstruct")


def test_keys_that_torch_reads_are_read_or_dropped(path):
    torch.save({"value": {1.5: 1, None: 2, True: 3, (1, 2): 4}}, path)
    assert torch.load(path, weights_only=True)["value"][1, 2] == 4
    assert torch_file.read(path)["value"] == {1.5: 1, None: 2, True: 3}


def test_tensors_with_attributes_are_read(path):
    weight, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    weight.note = parameter.note = "x"
    torch.save({"weight": weight, "parameter": parameter}, path)
    read = torch_file.read(path)
    assert_same_bits(read["weight"], weight)
    assert_same_bits(read["parameter"], parameter)


def test_files_of_torch_before_1_6_are_refused(path):
    torch.save({"value": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(torch_file.TorchFileError, match=r"before 1\.6"):
        torch_file.read(path)


def test_other_pickle_protocols_are_refused(path):
    torch.save({"value": torch.zeros(2)}, path, pickle_protocol=4)
    with pytest.raises(torch_file.TorchFileError, match="protocol 4"):
        torch_file.read(path)
