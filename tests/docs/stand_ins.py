"""Small files and short configs that stand for those of the documentation when tests run it."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image

import sam_jax
from sam_jax.masks import rle
from sam_jax.model.mae import MaskedAutoencoder, mae_tiny
from sam_jax.model.sam import Sam
from train.config import Optimizer

NUM_IMAGES = 5
SIZE = "64x96"


def write_photo(path):
    """Writes a JPEG of a scene, 1000 pixels per side."""
    write_image(path, (1000, 1000))


def write_slide(path):
    """Writes an image that is large for the model."""
    write_image(path, (2600, 1800))


def write_cells(path):
    """Writes a small image."""
    write_image(path, (200, 160))


def write_image(path, size):
    """Writes a scene that is enlarged to a size, (width, height)."""
    image = sam_jax.open_source("scenes:128x128").image(34)
    Image.fromarray(image).resize(size).save(path)


def write_images(folder):
    """Writes a folder of images without masks."""
    folder.mkdir()
    for i, example in enumerate(examples()):
        Image.fromarray(example.image).save(folder / f"{i}.jpg")


def write_coco(folder):
    """Writes `instances.json` and `images/`."""
    folder.mkdir()
    write_images(folder / "images")
    images, annotations = [], []
    for i, example in enumerate(examples()):
        height, width = example.image.shape[:2]
        images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
        for mask in example.masks:
            number = len(annotations) + 1
            record = {"id": number, "image_id": i, "category_id": 1, "iscrowd": 0}
            annotations.append(record | {"segmentation": mask, "area": rle.area(mask)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (folder / "instances.json").write_text(json.dumps(content))


def write_labels(folder):
    """Writes `index.json`, images and label maps."""
    folder.mkdir()
    entries = []
    for i, example in enumerate(examples()):
        labels = np.zeros(example.image.shape[:2], np.uint8)
        for number, mask in enumerate(example.masks, start=1):
            labels[rle.decode(mask)] = number
        Image.fromarray(example.image).save(folder / f"{i}.png")
        Image.fromarray(labels).save(folder / f"{i}_label.png")
        entries.append({"id": str(i), "image": f"{i}.png", "label": f"{i}_label.png"})
    (folder / "index.json").write_text(json.dumps(entries))


def write_sa1b(folder):
    """Writes images and their masks as those of SA-1B."""
    folder.mkdir()
    for i, example in enumerate(examples()):
        height, width = example.image.shape[:2]
        Image.fromarray(example.image).save(folder / f"sa_{i}.jpg")
        image = {"image_id": i, "file_name": f"sa_{i}.jpg", "height": height, "width": width}
        annotations = [{"segmentation": mask} for mask in example.masks]
        content = {"image": image, "annotations": annotations}
        (folder / f"sa_{i}.json").write_text(json.dumps(content))


def write_official_weights(path):
    """Writes a random tiny model under the official names, which not all models can have."""
    model = sam_jax.sam_tiny(decoder_heads=8, position_scale=1.0)
    sam_jax.save(path, model, jax.jit(lambda: sam_jax.init_variables(model, 0))())


def write_autoencoder(path):
    """Writes a random masked autoencoder."""
    model = mae_tiny()
    path.parent.mkdir(parents=True, exist_ok=True)
    sam_jax.save(path, model, jax.jit(lambda: sam_jax.init_variables(model, 0))())


def write_encoder(path):
    """Writes a random vision transformer, as a file that PyTorch reads."""
    model = MaskedAutoencoder(
        image_size=(224, 224), patch_size=16, embed_dim=64, depth=1, num_heads=1, decoder_dim=16,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    variables = jax.jit(lambda: sam_jax.init_variables(model, 0))()
    sam_jax.save(path, model, variables, format="official")


MAKERS = {
    "photo": write_photo,
    "slide": write_slide,
    "cells": write_cells,
    "images": write_images,
    "coco": write_coco,
    "labels": write_labels,
    "sa1b": write_sa1b,
    "official weights": write_official_weights,
    "autoencoder": write_autoencoder,
    "encoder": write_encoder,
}


def examples():
    """Returns the scenes that all stand-ins show."""
    scenes = sam_jax.open_source(f"scenes:{SIZE}")
    return [scenes[i] for i in range(NUM_IMAGES)]


def write_configs(folder, names):
    """Writes configs of short runs under the names of the configs of a folder."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(
            f"from configs.{name} import config as full\nfrom tests.docs import stand_ins\n\n"
            "config = stand_ins.shorten(full)\n"
        )


def shorten(config):
    """Returns the configuration of a run of two steps of a tiny model."""
    if isinstance(config.model, Sam):
        model = sam_jax.sam_tiny()
        rounds = {"num_clicks": 1, "num_extra_rounds": 0, "masks_per_image": 1}
        objective = dataclasses.replace(config.objective, **rounds, masks_per_chunk=1)
    else:
        model, objective = mae_tiny(), config.objective
    is_generated = config.data.source.startswith("scenes")
    held_out = "::50000" if is_generated else config.data.held_out
    return dataclasses.replace(
        config,
        model=model,
        objective=objective,
        data=dataclasses.replace(config.data, held_out=held_out, workers=0),
        optimizer=Optimizer(warmup_steps=1, lr_boundaries=(), layer_decay=1.0),
        batch_size=2,
        num_steps=2,
        stages=(),
        log_every=1,
        feature_cache="out/features",
    )
