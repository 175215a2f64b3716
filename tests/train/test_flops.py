"""Compares FLOP counts with tables that were computed by hand from the architecture."""

import pytest

from sam_jax.model.mae import mae_vit_b, mae_vit_h, mae_vit_l
from sam_jax.model.sam import sam_vit_b, sam_vit_h, sam_vit_l
from train.config import Interactive
from train.flops import (
    block_flops,
    decoder_flops,
    encoder_flops,
    peak_flops,
    reconstruction_flops,
    rounds_flops,
    step_flops,
)


@pytest.mark.parametrize(
    ("make", "encoder", "step"),
    [(sam_vit_b, 972, 10.79), (sam_vit_l, 2986, 16.83), (sam_vit_h, 5961, 25.76)],
)
def test_flops_of_official_sizes_match_the_table(make, encoder, step):
    assert encoder_flops(make()) / 1e9 == pytest.approx(encoder, abs=0.5)
    assert step_flops(make(), Interactive()) / 1e12 == pytest.approx(step, abs=0.005)


@pytest.mark.parametrize(
    ("make", "gigaflops"), [(mae_vit_b, 58.7), (mae_vit_l, 124.5), (mae_vit_h, 223.4)]
)
def test_flops_of_masked_autoencoders_match_the_table(make, gigaflops):
    assert reconstruction_flops(make()) / 1e9 == pytest.approx(gigaflops, abs=0.1)


@pytest.mark.parametrize(("tokens", "flops"), [(2, 3659), (7, 3741), (12, 3823)])
def test_flops_of_one_mask_match_the_table(tokens, flops):
    assert decoder_flops(sam_vit_b(), tokens) / 1e6 == pytest.approx(flops, abs=0.6)


def test_blocks_have_most_flops_of_the_encoder():
    model = sam_vit_h()
    blocks = 28 * block_flops(model, in_windows=True) + 4 * block_flops(model, in_windows=False)
    assert 0.99 < blocks / encoder_flops(model) < 1


@pytest.mark.parametrize(
    ("points", "extra", "clicks"), [(8, 2, 47.5), (8, 1, 44), (3, 0, 6), (0, 0, 0)]
)
def test_flops_of_rounds_include_the_tokens_of_clicks(points, extra, clicks):
    """`clicks` is summed over the rounds. The inserted round has 0 to 7, with equal probability."""
    model, rounds = sam_vit_b(), 1 + points + extra
    one_click = decoder_flops(model, 3) - decoder_flops(model, 2)
    config = Interactive(num_clicks=points, num_extra_rounds=extra)
    expected = rounds * decoder_flops(model, 2) + clicks * one_click
    assert rounds_flops(model, config) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_the_device_kind_determines_the_peak(kind, peak):
    assert peak_flops(kind) == peak
