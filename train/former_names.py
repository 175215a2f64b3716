"""Former names of configuration fields, which `--set` and saved configurations may still use.

They are read for one version after a field was renamed, with a warning.
"""

import logging
from collections.abc import Mapping
from typing import Any

from sam_jax.model.sam import FLAT_FIELDS

# By former path: the present one.
RENAMED = {
    "objective.points": "objective.num_clicks",
    "objective.extra_rounds": "objective.num_extra_rounds",
    "objective.chunk": "objective.masks_per_chunk",
    "objective.iou_all": "objective.iou_supervision",
    "objective.iou_l1": "objective.iou_loss",
    "data.turns": "data.rot90",
    "optimizer.drop_at": "optimizer.lr_boundaries",
    "optimizer.drop_by": "optimizer.lr_decay_factor",
    "match_attention": "mimetic_init_scale",
    "train_only": "trainable",
}
# By former path: the present value of a former one. Booleans became names.
VALUES: dict[str, dict[Any, str]] = {
    "objective.iou_all": {True: "all", False: "best"},
    "objective.iou_l1": {True: "l1", False: "mse"},
}

log = logging.getLogger("train")


def present_paths(path: str, fields: Mapping[str, Any]) -> list[str]:
    """Returns the present paths of a field, or the path itself if it was not renamed.

    Args:
      path: The path of a field, such as "objective.points" or "model.depth".
      fields: The fields of the configuration's model. `Sam` had flat fields, some of which are now
        in several of its parts.
    """
    name = path.removeprefix("model.")
    if path != name and name in FLAT_FIELDS and "image_encoder" in fields:
        paths = [f"model.{part}" for part in FLAT_FIELDS[name]]
    elif path in RENAMED:
        paths = [RENAMED[path]]
    else:
        return [path]
    log.warning("%s is now called %s", path, " and ".join(paths))
    return paths


def present_value(path: str, value: Any) -> Any:
    """Returns the present value of a field that had a value under a former path."""
    return VALUES[path].get(value, value) if path in VALUES else value


def rename_saved(saved: dict[str, Any]) -> dict[str, Any]:
    """Renames the fields of a saved configuration.

    Args:
      saved: Nested dicts of field values, as in config.json.

    Returns:
      The same with present names.
    """
    model = saved.get("model", {})
    fields = model if "image_encoder" in model else {}
    if "prompt_dim" in model:  # a flat `Sam`
        fields = {"image_encoder": None}
    renamed: dict[str, Any] = {}
    for path, value in _leaves(saved):
        for present in present_paths(path, fields):
            *parents, name = present.split(".")
            inner = renamed
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = present_value(path, value)
    return renamed


def _leaves(saved: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, value in saved.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves
