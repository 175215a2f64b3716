"""The rules and defaults of configs."""

import dataclasses

import pytest

from configs.mae_tiny import config as pretraining
from sam_jax.model.sam import Sam, sam_tiny
from train.config import (
    ConfigError,
    Data,
    Interactive,
    Optimizer,
    Reconstruction,
    TrainConfig,
)
from train.overrides import override
from train.tasks.base import TASKS, Task, make_task
from train.tasks.segmentation import frozen_part

MODEL = sam_tiny(image_size=(128, 128), patch_size=8, depth=4)
CONFIG = TrainConfig(model=MODEL, data=Data(source="scenes"))


def error_message(function, *args):
    """Returns the message of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "got", "allowed"),
    [
        ("batch_size=0", "0", "at least 1"),
        ("num_steps=0", "0", "at least 1"),
        ("log_every=0", "0", "at least 1"),
        ("checkpoint_every=0", "0", "at least 1"),
        ("evaluate_every=-1", "-1", "at least 0"),
        ("objective.num_clicks=17", "17", "0 to 16"),
        ("objective.num_clicks=-1", "-1", "0 to 16"),
        ("objective.num_extra_rounds=3", "3", "0, 1 or 2"),
        ("objective.masks_per_image=0", "0", "at least 1"),
        ("objective.masks_per_chunk=0", "0", "at least 1"),
        ("objective.loss_scale=3", "3", "1, 2 or 4"),
        ("data.source=", "''", "KIND:LOCATION"),
        ("data.max_bad=1.5", "1.5", "0 to 1"),
        ("data.max_bad=-0.5", "-0.5", "0 to 1"),
        ("optimizer.lr_boundaries=3,2", "(3, 2)", "steps in ascending order"),
        ("optimizer.warmup_steps=-1", "-1", "at least 0"),
        ("optimizer.peak_lr=0", "0.0", "above 0"),
        ("optimizer.peak_lr=-1e-3", "-0.001", "above 0"),
        ("optimizer.b1=1", "1.0", "at least 0 and below 1"),
        ("optimizer.b2=-0.1", "-0.1", "at least 0 and below 1"),
        ("optimizer.layer_decay=1.5", "1.5", "above 0, at most 1"),
        ("optimizer.lr_decay_factor=0", "0.0", "above 0"),
        ("optimizer.weight_decay=-0.1", "-0.1", "at least 0"),
        ("objective.dice=-1", "-1.0", "at least 0"),
        ("seed=-1", "-1", "0 to 2**32 - 1"),
        ("seed=4294967296", "4294967296", "0 to 2**32 - 1"),
        ("model.image_encoder.patch_size=0", "0", "at least 1"),
        ("model.image_encoder.embed_dim=63", "63", "a positive multiple of num_heads = 2"),
        ("model.mask_decoder.dropout=0.001", "0.001", "0, or 1/256 to 255/256"),
        (
            "model.image_encoder.image_size=(128, 100)",
            "(128, 100)",
            "two multiples of patch_size = 8",
        ),
        ("model.image_encoder.image_size=(0, 128)", "(0, 128)", "two multiples of patch_size = 8"),
    ],
)
def test_error_names_the_field_the_allowed_values_and_the_value(setting, got, allowed):
    message = error_message(override, CONFIG, [setting])
    assert message.startswith(f"{setting.split('=')[0]} must be ")
    assert message.endswith(f"; got {got}")
    assert allowed in message


@pytest.mark.parametrize(("scale", "patch"), [(1, 2), (2, 4), (4, 8), (4, 12)])
def test_patch_size_must_be_divisible_by_four_times_the_loss_scale(scale, patch):
    part = "model.image_encoder"
    settings = [f"{part}.image_size=(96, 96)", f"{part}.patch_size={patch}"]
    config = override(CONFIG, [*settings, f"objective.loss_scale={scale}"])
    message = error_message(make_task, config)
    assert message.startswith(
        "model.image_encoder.patch_size must be divisible by 4 x objective.loss_scale"
    )
    assert f"= {4 * scale}," in message
    assert message.endswith(f"; got {patch}")


@pytest.mark.parametrize(
    "setting",
    [
        "objective.num_clicks=0",
        "objective.num_clicks=16",
        "objective.num_extra_rounds=0",
        "data.max_bad=0",
        "data.max_bad=1",
        "evaluate_every=0",
        "optimizer.warmup_steps=0",
        "optimizer.lr_boundaries=2,2",
        "objective.loss_scale=2",
    ],
)
def test_limits_of_the_rules_are_allowed(setting):
    make_task(override(CONFIG, [setting]))


@pytest.mark.parametrize("field", ["flips", "rot90"])
def test_random_transforms_need_an_encoder_that_is_trained(field):
    settings = [f"data.{field}=True", "trainable=mask_decoder,prompt_encoder"]
    message = error_message(make_task, override(CONFIG, settings))
    assert message.startswith("data.views must be at least 1 if the image encoder is not trained")
    assert message.endswith("got 0 and trainable=('mask_decoder', 'prompt_encoder')")
    make_task(override(CONFIG, [*settings, "data.views=3"]))
    make_task(override(CONFIG, [settings[0], "trainable=mask_decoder,image_encoder/block_03"]))


def test_windows_need_images_that_are_decoded_in_full():
    settings = ["data.jitter=0.5,1", "data.half_size_jpeg=True"]
    message = error_message(make_task, override(CONFIG, settings))
    assert message.startswith("data.half_size_jpeg must be False if data.jitter is set")


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ((), None),
        (("image_encoder",), None),
        (("mask_decoder", "image_encoder/block_03/lin1"), None),
        (("image_encoder/neck", "image_encoder/block_03"), None),
        (("mask_decoder", "prompt_encoder/top_left"), "embedding"),
        (("mask_decoder", "image_encoder/neck"), "trunk"),
        (("image_encoder/neck/conv1",), "trunk"),
    ],
)
def test_features_are_kept_of_what_is_not_trained(trainable, expected):
    assert frozen_part(dataclasses.replace(CONFIG, trainable=trainable)) == expected


def test_rules_apply_to_configs_constructed_in_python():
    assert "batch_size must be at least 1; got 0" in error_message(
        lambda: dataclasses.replace(CONFIG, batch_size=0)
    )


def test_defaults_are_those_of_the_paper():
    """Source: Kirillov et al. 2023, appendix A, for ViT-H; the paper does not give all of them."""
    config = TrainConfig(model=Sam(), data=Data(source="x"))
    assert (config.batch_size, config.num_steps) == (256, 90_000)
    assert config.optimizer == Optimizer(
        peak_lr=8e-4,
        warmup_steps=250,
        lr_boundaries=(60_000, 86_666),
        lr_decay_factor=0.1,
        weight_decay=0.1,
        layer_decay=0.8,
        b1=0.9,
        b2=0.999,
    )
    assert config.objective == Interactive(
        num_clicks=8,
        num_extra_rounds=2,
        focal=20.0,
        dice=1.0,
        iou=1.0,
        masks_per_image=64,
        multimask=True,
        multimask_extra=False,
        detach_mask=True,
        iou_supervision="best",
        iou_loss="mse",
        loss_scale=1,
        box_noise="gaussian",
    )
    assert not config.data.flips
    assert not config.data.rot90


@pytest.mark.parametrize(
    ("setting", "got", "allowed"),
    [
        ("model.mask_ratio=0.0", "0.0", "such that some of the 64 patches are removed"),
        ("model.mask_ratio=0.99", "0.99", "such that some of the 64 patches are removed"),
        ("model.embed_dim=66", "66", "a multiple of 4"),
        ("model.decoder_dim=6", "6", "a multiple of 4"),
        ("model.decoder_dim=7", "7", "a positive multiple of decoder_heads = 2"),
        ("model.image_size=(64, 60)", "(64, 60)", "two multiples of patch_size = 8"),
        ("model.patch_size=0", "0", "at least 1"),
        ("data.min_area=0", "0.0", "more than 0, at most 1"),
        ("data.min_area=1.1", "1.1", "more than 0, at most 1"),
        ("data.source=", "''", "KIND:LOCATION"),
        ("mimetic_init_scale=1", "1.0", "0, because a masked autoencoder has no prompts"),
        ("optimizer.cosine_steps=100", "100", "0, or more than optimizer.warmup_steps"),
        ("optimizer.cosine_steps=-1", "-1", "0, or more than optimizer.warmup_steps"),
    ],
)
def test_rules_of_masked_autoencoders(setting, got, allowed):
    message = error_message(lambda: make_task(override(pretraining, [setting])))
    assert message.startswith(f"{setting.split('=')[0]} must be ")
    assert message.endswith(f"; got {got}")
    assert allowed in message


@pytest.mark.parametrize(
    "change", [{"model": MODEL}, {"data": Data(source="scenes")}, {"objective": Interactive()}]
)
def test_model_data_and_objective_belong_to_one_task(change):
    message = error_message(make_task, dataclasses.replace(pretraining, **change))
    assert message.startswith(
        "model, data and objective must be Sam, Data, Interactive or MaskedAutoencoder, "
        "PretrainData, Reconstruction; got "
    )
    assert type(next(iter(change.values()))).__name__ in message.split("got ")[1]
    mixed = dataclasses.replace(CONFIG, objective=Reconstruction())
    assert "Reconstruction" in error_message(make_task, mixed)


def test_every_task_has_the_members_of_the_protocol():
    for config, row in zip((CONFIG, pretraining), TASKS, strict=True):
        task = make_task(config)
        assert isinstance(task, row.task)
        assert isinstance(task, Task)
