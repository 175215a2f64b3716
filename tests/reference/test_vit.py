"""Compares image encoders read from plain vision transformers with transformers and timm's graph.

The references run without their class token, which the image encoder does not have. Random weights
exercise every tensor.
"""

import flax.traverse_util
import jax
import numpy as np
import pytest

from sam_jax.model.image_encoder import ImageEncoder
from sam_jax.model.init import variable_shapes
from sam_jax.weights.formats import read
from sam_jax.weights.vit import read_plain_vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-4  # of the largest magnitude
PATCH, DEPTH, HEADS, WIDTH = 14, 3, 4, 64
TRAINED_SIZE = 5 * PATCH
SIZES = {"the trained size": (70, 70), "square": (98, 98), "no square": (56, 84)}
CONFIG = dict(
    image_size=TRAINED_SIZE,
    patch_size=PATCH,
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    intermediate_size=4 * WIDTH,
    layer_norm_eps=1e-6,  # the default of ViT is 1e-12; the published weights use this value
)


@pytest.fixture(params=SIZES)
def image(request):
    """Returns normalized images 'b h w 3'."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, *SIZES[request.param], 3)).astype(np.float32)


def tensor_of(image):
    return torch.tensor(image).permute(0, 3, 1, 2)


def randomized(model):
    """Randomizes all weights, so large that attention is far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn_like(x) * (0.5 if x.ndim != 2 else 2 * x.shape[-1] ** -0.5))
            x.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def encoder_features(path, image):
    """Returns the tokens before the neck, after the reference's last norm: 'b (gh gw) c'."""
    checkpoint = read(path)
    encoder = ImageEncoder(
        image_size=image.shape[1:3],
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        global_blocks=tuple(range(DEPTH)),
        out_dim=16,
    )
    vit = read_plain_vit(encoder, checkpoint.tensors, [])
    zeros = {path: np.zeros(x.shape, "f4") for path, x in variable_shapes(encoder).items()}
    assert {path for path in zeros if "neck" not in path and "rel_pos" not in path} == {
        f"params/{path}" for path in vit.params
    }
    flat = zeros | {f"params/{path}": value for path, value in vit.params.items()}
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    tokens = jax.jit(lambda v, x: encoder.apply(v, x, part="trunk"))(variables, image)
    tokens = np.asarray(tokens).reshape(len(image), -1, WIDTH)
    deviation = np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    normed = (tokens - tokens.mean(-1, keepdims=True)) / deviation
    return normed * vit.norm_scale + vit.norm_bias


def test_dinov2(image, tmp_path, difference):
    config = {k: v for k, v in CONFIG.items() if k != "intermediate_size"}
    reference = randomized(transformers.Dinov2Model(transformers.Dinov2Config(**config)))
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        patches = reference.embeddings(tensor_of(image))[:, 1:]
        expected = reference.layernorm(reference.encoder(patches).last_hidden_state).numpy()
    assert read(tmp_path).num_heads == HEADS
    assert difference(encoder_features(tmp_path, image), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["ViTModel", "ViTMAEForPreTraining"])
def test_vit(kind, image, tmp_path, difference):
    if kind == "ViTModel":
        reference = randomized(transformers.ViTModel(transformers.ViTConfig(**CONFIG)))
    else:
        config = transformers.ViTMAEConfig(**CONFIG, decoder_num_hidden_layers=1)
        reference = randomized(transformers.ViTMAEForPreTraining(config))
    reference.save_pretrained(tmp_path)
    encoder = getattr(reference, "vit", reference)
    with torch.no_grad():
        if kind == "ViTModel":
            x = encoder.embeddings(tensor_of(image), interpolate_pos_encoding=True)[:, 1:]
        else:  # its embeddings are masked
            embeddings = encoder.embeddings
            x = embeddings.patch_embeddings.projection(tensor_of(image)).flatten(2).mT
            x = x + embeddings.interpolate_pos_encoding(x, *image.shape[1:3])[:, -x.shape[1] :]
        for layer in encoder.layers:
            x = layer(x)
        expected = encoder.layernorm(x).numpy()
    assert read(tmp_path).num_heads == HEADS
    assert difference(encoder_features(tmp_path, image), expected) < TOLERANCE


def timm_state():
    rng = torch.Generator().manual_seed(0)
    layers = {"norm": (WIDTH,)}
    for i in range(DEPTH):
        layers |= {f"blocks.{i}.norm1": (WIDTH,), f"blocks.{i}.norm2": (WIDTH,)}
        layers |= {f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH)}
        layers |= {f"blocks.{i}.attn.proj": (WIDTH, WIDTH)}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH)}
        layers |= {f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH)}
    shapes = {
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"blocks.{i}.ls{j}.gamma": (WIDTH,) for i in range(DEPTH) for j in (1, 2)}
    shapes |= {"pos_embed": (1, 25, WIDTH), "cls_token": (1, 1, WIDTH), "head.bias": (10,)}
    return {
        name: torch.randn(shape, generator=rng) * (0.5 if len(shape) != 2 else 2 * shape[1] ** -0.5)
        for name, shape in shapes.items()
    }


def timm_features(state, image):
    """timm's `VisionTransformer.forward_features` with LayerScale, but without the class token."""
    F = torch.nn.functional

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    kernel, bias = (state[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(tensor_of(image), kernel, bias, stride=PATCH)
    b, _, gh, gw = x.shape
    positions = state["pos_embed"].reshape(1, 5, 5, WIDTH).permute(0, 3, 1, 2)
    x = x + F.interpolate(positions, (gh, gw), mode="bicubic", align_corners=False)
    x = x.flatten(2).transpose(1, 2)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.reshape(b, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", y)
        y = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", y)
    return norm("norm", x).numpy()


def test_timm(image, tmp_path, difference):
    state = timm_state()
    torch.save({"state_dict": {f"model.{k}": x for k, x in state.items()}}, tmp_path / "vit.pth")
    ours = encoder_features(tmp_path / "vit.pth", image)
    assert difference(ours, timm_features(state, image)) < TOLERANCE
