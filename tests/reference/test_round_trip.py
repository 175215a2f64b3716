"""Checks that weights survive loading and saving: official files bitwise, and MAE encoders."""

import logging

import pytest
import safetensors

import sam_jax

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.reference


@pytest.fixture(params=[".pth", ".safetensors"])
def suffix(request):
    return request.param


@pytest.mark.parametrize("decoder_depth", [2, 3])
def test_official_to_sam_jax_and_back_is_bitwise(
    build_tiny_reference, tmp_path, suffix, decoder_depth
):
    reference = build_tiny_reference(decoder_depth=decoder_depth)
    _write(tmp_path / f"a{suffix}", reference.state_dict())
    sam_jax.save(tmp_path / f"b{suffix}", *sam_jax.load(tmp_path / f"a{suffix}"))
    state = _read(tmp_path / f"b{suffix}")
    _assert_same(state, reference.state_dict())
    other = build_tiny_reference(decoder_depth=decoder_depth, seed=1)
    other.load_state_dict(state, strict=True)
    _assert_same(other.state_dict(), reference.state_dict())


def test_round_trip_through_every_format_is_bitwise(tiny_reference, tmp_path):
    _write(tmp_path / "a.pth", tiny_reference.state_dict())
    paths = {"b": "sam_jax", "c": "huggingface", "d.safetensors": None, "e.pth": None}
    loaded = sam_jax.load(tmp_path / "a.pth")
    for path, format in paths.items():
        sam_jax.save(tmp_path / path, *loaded, format=format)
        before, loaded = loaded, sam_jax.load(tmp_path / path)
        assert loaded[0] == before[0]
    _assert_same(_read(tmp_path / "e.pth"), tiny_reference.state_dict())


def test_the_model_is_inferred_from_the_shapes(tiny_reference, tmp_path):
    _write(tmp_path / "a.pth", tiny_reference.state_dict())
    model, _ = sam_jax.load(tmp_path / "a.pth")
    assert model == sam_jax.build_sam(
        image_size=(64, 64),
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=2,
        global_blocks=(1, 3),
        window_size=3,
        mlp_ratio=4,
        prompt_dim=64,
        mask_channels=16,
        decoder_depth=2,
        decoder_mlp_dim=128,
        iou_hidden_dim=48,
    )


def test_position_tables_of_images_that_are_not_square(tiny_reference, tmp_path, suffix):
    """Loads position tables for a grid of 6 by 11 tokens. The tables of windows are unchanged."""
    state = dict(tiny_reference.state_dict())
    state["image_encoder.pos_embed"] = torch.randn(1, 6, 11, 64)
    for i in (1, 3):
        state[f"image_encoder.blocks.{i}.attn.rel_pos_h"] = torch.randn(11, 32)
        state[f"image_encoder.blocks.{i}.attn.rel_pos_w"] = torch.randn(21, 32)
    _write(tmp_path / f"a{suffix}", state)
    model, variables = sam_jax.load(tmp_path / f"a{suffix}")
    assert model.image_size == (48, 88)
    assert (model.image_encoder.window_size, model.image_encoder.global_blocks) == (3, (1, 3))
    sam_jax.save(tmp_path / f"b{suffix}", model, variables)
    _assert_same(_read(tmp_path / f"b{suffix}"), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_converts_exactly_to_float32(tiny_reference, tmp_path, suffix, dtype):
    halved = {k: v.to(getattr(torch, dtype)) for k, v in tiny_reference.state_dict().items()}
    _write(tmp_path / f"a{suffix}", halved)
    sam_jax.save(tmp_path / f"b{suffix}", *sam_jax.load(tmp_path / f"a{suffix}"))
    expected = {name: tensor.float() for name, tensor in halved.items()}
    _assert_same(_read(tmp_path / f"b{suffix}"), expected)


def test_training_checkpoints_are_loaded(tiny_reference, tmp_path):
    """Loads a checkpoint with other entries, prefixed names and the pixel statistics."""
    state = tiny_reference.state_dict() | {
        "pixel_mean": tiny_reference.pixel_mean,
        "pixel_std": tiny_reference.pixel_std,
    }
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    sam_jax.save(tmp_path / "b.pth", *sam_jax.load(tmp_path / "a.pth"))
    _assert_same(_read(tmp_path / "b.pth"), tiny_reference.state_dict())


def test_position_tables_of_another_image_size_are_resized(
    tiny_reference, tmp_path, difference, caplog
):
    """Checks that the loader resizes tables with a warning. The reference resizes in every call."""
    state, stored = dict(tiny_reference.state_dict()), {}
    for i in (1, 3):
        for axis in "hw":
            name = f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"
            stored[name] = torch.randn(11, 32)
    _write(tmp_path / "a.pth", state | stored)
    with caplog.at_level(logging.WARNING, "sam_jax"):
        model, variables = sam_jax.load(tmp_path / "a.pth")
    assert all(name in caplog.text for name in stored)
    assert (model.image_size, model.image_encoder.global_blocks) == ((64, 64), (1, 3))
    sam_jax.save(tmp_path / "b.pth", model, variables)
    saved = _read(tmp_path / "b.pth")
    for name, table in stored.items():
        expected = torch.nn.functional.interpolate(table.T[None], size=15, mode="linear")[0].T
        assert difference(saved[name], expected) <= 1e-5
        del saved[name], state[name]
    _assert_same(saved, state)


PATCH_KERNEL = "patch_embed.proj.weight"
# Width, patch size and grid side for pre-training images of 224 pixels. All depths are 4 here.
MAE = {"vit_b": (768, 16, 14), "vit_h": (1280, 14, 16)}


@pytest.mark.parametrize("size", MAE)
def test_mae_checkpoints_initialize_the_image_encoder(tmp_path, difference, caplog, size):
    width, patch, grid = MAE[size]
    state = _mae_state(width, patch, grid)
    torch.save({"model": state, "epoch": 799, "scaler": {}}, tmp_path / "mae.pth")
    with caplog.at_level(logging.WARNING, "sam_jax"):
        model, variables = sam_jax.load(tmp_path / "mae.pth")
    assert all(name in caplog.text for name in ("cls_token", "norm.weight", "decoder_pos_embed"))
    assert model == sam_jax.build_sam(
        embed_dim=width,
        depth=4,
        num_heads={768: 12, 1280: 16}[width],
        global_blocks=(0, 1, 2, 3),
    )
    sam_jax.save(tmp_path / "sam.pth", model, variables)
    saved = _read(tmp_path / "sam.pth")

    renamed = {
        f"image_encoder.{name}".replace("mlp.fc", "mlp.lin"): tensor
        for name, tensor in state.items()
        if name.startswith("blocks.")
    }
    assert len(renamed) == 4 * 12
    renamed["image_encoder.patch_embed.proj.bias"] = state["patch_embed.proj.bias"]
    _assert_same({name: saved[name] for name in renamed}, renamed)

    bicubic = dict(mode="bicubic", align_corners=False)
    positions = state["pos_embed"][:, 1:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(positions, size=(64, 64), **bicubic)
    got = saved["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    assert difference(got, positions) <= 1e-5

    kernel = state[PATCH_KERNEL]
    if patch == 14:  # scaled so that the response to a constant patch is unchanged
        kernel = (14 / 16) ** 2 * torch.nn.functional.interpolate(kernel, size=(16, 16), **bicubic)
    got = saved[f"image_encoder.{PATCH_KERNEL}"]
    assert difference(got, kernel) <= 1e-5

    tables = [tensor for name, tensor in saved.items() if "rel_pos" in name]
    assert len(tables) == 4 * 2
    assert not any(table.any() for table in tables)
    for i in (0, 2):  # PyTorch initializes them uniformly within 1 / sqrt(fan in)
        kernel = saved[f"image_encoder.neck.{i}.weight"]
        scaled = kernel * kernel[0].numel() ** 0.5
        assert scaled.abs().max() <= 1
        assert 0.99 < scaled.std() * 3**0.5 < 1.01


def _mae_state(width, patch, grid):
    """Returns random tensors as in a pre-training checkpoint of facebookresearch/mae.

    The encoder has four blocks, and the decoder has one.
    """
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid**2, width)}
    shapes |= _layer("patch_embed.proj", width, 3, patch, patch) | _layer("norm", width)
    for i in range(4):
        shapes |= _block(f"blocks.{i}", width)
    shapes |= {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 1 + grid**2, 64)}
    shapes |= _layer("decoder_embed", 64, width) | _block("decoder_blocks.0", 64)
    shapes |= _layer("decoder_norm", 64) | _layer("decoder_pred", 3 * patch**2, 64)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _block(name, width):
    return {
        **_layer(f"{name}.norm1", width),
        **_layer(f"{name}.attn.qkv", 3 * width, width),
        **_layer(f"{name}.attn.proj", width, width),
        **_layer(f"{name}.norm2", width),
        **_layer(f"{name}.mlp.fc1", 4 * width, width),
        **_layer(f"{name}.mlp.fc2", width, 4 * width),
    }


def _layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _write(path, state):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), path)
    else:
        torch.save(state, path)


def _read(path):
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def _assert_same(state, expected):
    """Asserts that float32 tensors are bitwise equal."""
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype == torch.float32, name
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name
