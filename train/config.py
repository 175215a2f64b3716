"""What a training run is: frozen dataclasses, one comment a field."""

import dataclasses
from typing import Any, Literal

from sam_jax.model.mae import MaskedAutoencoder
from sam_jax.model.sam import Sam


class ConfigError(ValueError):
    """A configuration that cannot be run, and why."""


@dataclasses.dataclass(frozen=True)
class Interactive:
    """SAM's objective. The defaults are the paper's, or ours where it is silent."""

    num_clicks: int = 8  # clicks sampled after the first prompt, one a round
    num_extra_rounds: int = 2  # without new information: the last, and (if 2) one before some click
    focal: float = 20.0  # weight of the focal loss
    dice: float = 1.0  # weight of the dice loss
    iou: float = 1.0  # weight of the loss of the predicted IoU
    masks_per_image: int = 64  # at most, drawn at random
    multimask: bool = True  # three outputs for the first prompt; else the single one always
    multimask_extra: bool = False  # three outputs too where only an extra round followed the first
    detach_mask: bool = True  # no gradient through the mask prompt into the round before
    iou_supervision: Literal["best", "all"] = "best"  # masks whose predicted IoU is supervised
    iou_loss: Literal["mse", "l1"] = "mse"  # squared or absolute error of the predicted IoU
    loss_scale: int = 1  # 1, 2, 4: the loss at this multiple of the decoder's resolution
    box_noise: Literal["gaussian", "uniform"] = "gaussian"  # law of the first box's noise
    masks_per_chunk: int = (
        16  # masks an image in one go; bounds the memory, does not change the result
    )


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The masked autoencoder's objective."""

    normalized: bool = True  # each patch by its own mean and deviation; else in plain colours


@dataclasses.dataclass(frozen=True)
class Data:
    """Where SAM's examples come from."""

    source: str  # kind:place, e.g. sa1b:/data/sa1b, coco:DIR, labels:DIR, tfds:NAME, scenes
    held_out: str = ""  # slice of the source's images that only the evaluation sees, e.g. 0::5
    flips: bool = False  # mirror images left to right at random
    rot90: bool = False  # turn images by a random multiple of 90 degrees
    half_size_jpeg: bool = False  # decode JPEGs at half size where the frame allows: faster
    workers: int = 0  # processes that decode; 0: threads of this one
    max_bad: float = 0.001  # fraction of unusable samples that ends the run


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """Where the masked autoencoder's images come from, and which crops of them are taken."""

    source: str  # kind:place, e.g. tfds:imagenet2012, images:DIR, or any that SAM learns from
    held_out: str = ""  # slice of the source's images that only the evaluation sees, e.g. 0::5
    min_area: float = 0.2  # of an image, that a crop has at least
    flips: bool = True  # mirror images left to right at random
    rot90: bool = False  # turn images by a random multiple of 90 degrees
    half_size_jpeg: bool = False  # decode JPEGs at half size where the frame allows: faster
    workers: int = 0  # processes that decode; 0: threads of this one
    max_bad: float = 0.001  # fraction of unusable images that ends the run


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up, drops and layer-wise decay of the image encoder's learning rate."""

    peak_lr: float = 8e-4
    warmup_steps: int = 250
    lr_boundaries: tuple[int, ...] = (60_000, 86_666)  # steps at which the rate drops
    lr_decay_factor: float = 0.1  # factor of each drop
    cosine_steps: int = 0  # by which a half-cosine after the warm-up has come to 0; 0: none
    weight_decay: float = 0.1  # not of biases, norms, embeddings and positions
    layer_decay: float = 0.8  # rate of each encoder block over that of the next
    b1: float = 0.9
    b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run: of a SAM, or of the masked autoencoder that its encoder begins as."""

    model: Sam | MaskedAutoencoder
    data: Data | PretrainData
    objective: Interactive | Reconstruction = Interactive()
    optimizer: Optimizer = Optimizer()
    batch_size: int = 256  # images
    num_steps: int = 90_000
    fsdp: int = 1  # devices over which each large array of the state is split
    init_from: str = ""  # weights to start from: whatever `sam_jax.load` takes, or an autoencoder's
    mimetic_init_scale: float = (
        0.0  # scale of matched first weights (`train.initialization`); 0: none
    )
    trainable: tuple[str, ...] = ()  # parts that learn, by parameter path; none: all
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 0  # steps; 0: only at the end
    profile: tuple[int, ...] = ()  # first and last step of a profiler's trace; none: no trace
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


KINDS = (
    (Sam, Data, Interactive),
    (MaskedAutoencoder, PretrainData, Reconstruction),
)  # that go together


def check(config: TrainConfig) -> None:
    """Raises ConfigError, naming the field, for values that cannot be run."""
    kind = (type(config.model), type(config.data), type(config.objective))
    if kind not in KINDS:
        allowed = " or ".join(", ".join(k.__name__ for k in kinds) for kinds in KINDS)
        got = ", ".join(k.__name__ for k in kind)
        raise ConfigError(f"model, data and objective must be {allowed}; got {got}")
    check_rules(rules_of_run(config))
    try:
        config.model.validate()
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    (check_painting if is_reconstruction(config) else check_sam)(config)


def is_reconstruction(config: TrainConfig) -> bool:
    """Whether a masked autoencoder learns."""
    return isinstance(config.model, MaskedAutoencoder)


def check_rules(rules: list[tuple[str, Any, bool, str]]) -> None:
    """Raises ConfigError for the first that fails of (name, value, whether it may be, what may)."""
    for name, got, holds, allowed in rules:
        if not holds:
            raise ConfigError(f"{name} must be {allowed}; got {got!r}")


def rules_of_run(config: TrainConfig) -> list[tuple[str, Any, bool, str]]:
    """Those of any run."""
    data, optimizer = config.data, config.optimizer
    return [
        *(at_least(name, getattr(config, name), 1)
          for name in ("batch_size", "fsdp", "num_steps", "log_every", "checkpoint_every")),
        at_least("evaluate_every", config.evaluate_every, 0),
        ("data.source", data.source, bool(data.source), "kind:place"),
        ("data.max_bad", data.max_bad, 0 <= data.max_bad <= 1, "0 to 1"),
        ("profile", config.profile,
         len(config.profile) in (0, 2) and list(config.profile) == sorted(config.profile),
         "a first and a last step, or ()"),
        at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        ("optimizer.lr_boundaries", optimizer.lr_boundaries,
         list(optimizer.lr_boundaries) == sorted(optimizer.lr_boundaries), "steps in order"),
        ("optimizer.cosine_steps", optimizer.cosine_steps,
         optimizer.cosine_steps == 0 or optimizer.cosine_steps > optimizer.warmup_steps,
         "0, or more than optimizer.warmup_steps"),
    ]  # fmt: skip


def check_sam(config: TrainConfig) -> None:
    """Raises ConfigError for what a SAM's run cannot have."""
    model, objective = config.model, config.objective
    check_rules([
        ("objective.num_clicks", objective.num_clicks, 0 <= objective.num_clicks <= 16, "0 to 16"),
        ("objective.num_extra_rounds", objective.num_extra_rounds,
         objective.num_extra_rounds in (0, 1, 2), "0, 1 or 2"),
        at_least("objective.masks_per_image", objective.masks_per_image, 1),
        at_least("objective.masks_per_chunk", objective.masks_per_chunk, 1),
        ("objective.loss_scale", objective.loss_scale, objective.loss_scale in (1, 2, 4),
         "1, 2 or 4"),
        at_least("mimetic_init_scale", config.mimetic_init_scale, 0),
    ])  # fmt: skip
    if not learns_encoder(config) and (config.data.flips or config.data.rot90):
        raise ConfigError(
            "data.flips and data.rot90 must be False where the image encoder does not learn: its "
            f"embeddings are computed once; got trainable={config.trainable}"
        )
    if model.patch_size % (4 * objective.loss_scale):
        raise ConfigError(
            f"model.patch_size must be divisible by 4 x objective.loss_scale = "
            f"{4 * objective.loss_scale}, so that the loss is at whole pixels; got "
            f"{model.patch_size}"
        )


def check_painting(config: TrainConfig) -> None:
    """Raises ConfigError for what a masked autoencoder's run cannot have."""
    data = config.data
    check_rules([
        ("data.min_area", data.min_area, 0 < data.min_area <= 1, "more than 0, at most 1"),
        ("mimetic_init_scale", config.mimetic_init_scale, config.mimetic_init_scale == 0,
         "0: a masked autoencoder has no prompts"),
    ])  # fmt: skip


def at_least(name: str, value: float, least: int) -> tuple[str, Any, bool, str]:
    """A rule."""
    return name, value, value >= least, f"at least {least}"


def learns_encoder(config: TrainConfig) -> bool:
    """Whether any part of a SAM's image encoder learns."""
    parts = (part.split("/")[0] for part in config.trainable)
    return not config.trainable or "image_encoder" in parts
