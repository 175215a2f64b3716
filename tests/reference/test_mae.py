"""Compares the masked autoencoder with Hugging Face, for weights where every tensor matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model.mae import encode_positions, mae_tiny, reconstruction_loss
from sam_jax.model.sam import PIXEL_MEAN, PIXEL_STD, normalize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-4  # of the largest magnitude
MODEL = mae_tiny(decoder_dim=48, decoder_depth=2, decoder_heads=3)
B = 3


@pytest.fixture(scope="module")
def reference():
    config = transformers.ViTMAEConfig(
        image_size=64,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=192,
        layer_norm_eps=1e-6,  # as in the original code; the default of Hugging Face is 1e-12
        norm_pix_loss=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(config).eval()
    embeddings, decoder = model.vit.embeddings, model.decoder
    for x in (embeddings.patch_embeddings.projection, *model.parameters()):
        x._is_hf_initialized = False  # otherwise the fixed positions would not be initialized
    embeddings.initialize_weights()
    decoder.initialize_weights(64)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.requires_grad:  # positions are fixed
                x.copy_(torch.randn_like(x) * (0.5 if x.ndim == 1 else 2 * x.shape[-1] ** -0.5))
                x.add_(1.0 if "layernorm" in name.lower() and name.endswith("weight") else 0.0)
    return model


@pytest.fixture(scope="module")
def params(reference):
    """Returns the parameters of the reference under the names of `sam_jax`."""
    state = {name: x.numpy() for name, x in reference.state_dict().items()}

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(name):
        q, k, v = (dense(f"{name}.attention.{x}_proj") for x in "qkv")
        return {
            "attention": {
                "qkv": jax.tree.map(lambda *x: np.concatenate(x, axis=-1), q, k, v),
                "proj": dense(f"{name}.attention.o_proj"),
            },
            "norm1": norm(f"{name}.layernorm_before"),
            "norm2": norm(f"{name}.layernorm_after"),
            "lin1": dense(f"{name}.mlp.fc1"),
            "lin2": dense(f"{name}.mlp.fc2"),
        }

    patches = "vit.embeddings.patch_embeddings.projection"
    kernel = state[f"{patches}.weight"].transpose(2, 3, 1, 0)
    return {
        "patch_embed": {"kernel": kernel, "bias": state[f"{patches}.bias"]},
        "class_token": state["vit.embeddings.cls_token"].ravel(),
        "mask_token": state["decoder.mask_token"].ravel(),
        "norm": norm("vit.layernorm"),
        "decoder_embed": dense("decoder.decoder_embed"),
        "decoder_norm": norm("decoder.decoder_norm"),
        "decoder_pred": dense("decoder.decoder_pred"),
        **{f"block_{i:02d}": block(f"vit.layers.{i}") for i in range(2)},
        **{f"decoder_block_{i:02d}": block(f"decoder.decoder_layers.{i}") for i in range(2)},
    }


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (B, 64, 64, 3), np.uint8)
    return np.array(normalize(pixels, np.full((B, 2), 64)))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(7), B)


def noise_for(keys):
    """Returns noise for which Hugging Face orders the patches as `sam_jax` does for these keys."""
    order = np.asarray(jax.vmap(MODEL.sample_order)(keys))
    return torch.tensor(np.argsort(order, axis=1).astype(np.float32))


def to_torch(image):
    return torch.tensor(image.transpose(0, 3, 1, 2))


def assert_close(actual, expected):
    assert np.shape(actual) == np.shape(expected)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale)


def test_positions_equal_the_reference(reference):
    for table, c in (
        (reference.vit.embeddings.position_embeddings, 64),
        (reference.decoder.decoder_pos_embed, 48),
    ):
        np.testing.assert_allclose(table[0, 1:].numpy(), encode_positions(8, 8, c), atol=1e-5)
        assert not table[0, 0].any()


def test_encodings_and_reconstructions_equal_the_reference(reference, params, image, keys):
    with torch.no_grad():
        outputs = reference(to_torch(image), noise=noise_for(keys))
        encoded = reference.vit(to_torch(image), noise=noise_for(keys)).last_hidden_state
    visible = jax.vmap(MODEL.sample_order)(keys)[:, : MODEL.num_visible]
    actual = MODEL.apply({"params": params}, image, visible, method="encode")
    assert_close(actual, encoded.numpy())
    reconstructed = jax.jit(MODEL.apply)({"params": params}, image, keys)
    assert_close(reconstructed.patches, outputs.logits.numpy())
    np.testing.assert_array_equal(reconstructed.mask, outputs.mask.numpy() > 0)


def test_loss_and_gradients_equal_the_reference(reference, params, image, keys):
    def loss_of(params):
        reconstructed = MODEL.apply({"params": params}, image, keys)
        return jnp.mean(reconstruction_loss(reconstructed, image, 8, normalized=True))

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(jax.tree.map(jnp.asarray, params))
    reference.zero_grad()
    expected = reference(to_torch(image), noise=noise_for(keys)).loss
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=TOLERANCE)
    layer = reference.vit.layers[0]
    assert_close(gradients["block_00"]["lin1"]["kernel"], layer.mlp.fc1.weight.grad.T.numpy())
    assert_close(gradients["class_token"], reference.vit.embeddings.cls_token.grad.ravel().numpy())
    assert_close(gradients["mask_token"], reference.decoder.mask_token.grad.ravel().numpy())
    kernel = reference.vit.embeddings.patch_embeddings.projection.weight.grad
    assert_close(gradients["patch_embed"]["kernel"], kernel.permute(2, 3, 1, 0).numpy())


def test_pixel_statistics_are_those_of_imagenet():
    np.testing.assert_allclose(np.array(PIXEL_MEAN) / 255, [0.485, 0.456, 0.406], atol=1e-6)
    np.testing.assert_allclose(np.array(PIXEL_STD) / 255, [0.229, 0.224, 0.225], atol=1e-6)
