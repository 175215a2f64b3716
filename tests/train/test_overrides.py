"""Settings on the command line, config files, and configs as JSON."""

import dataclasses
import json

import pytest

from configs.mae_tiny import config as pretraining
from sam_jax.io.settings_guard import differences
from sam_jax.model.sam import Sam, replace_fields, sam_tiny
from train.config import ConfigError, Data, Interactive, Optimizer, Stage, TrainConfig
from train.former_names import rename_saved
from train.overrides import load_config, override, to_dict, to_json

MODEL = sam_tiny(image_size=(128, 128), patch_size=8, depth=4)
CONFIG = TrainConfig(model=MODEL, data=Data(source="scenes"))


def error_message(function, *args):
    """Returns the message of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as error:
        function(*args)
    return str(error.value)


def field_names(config_class):
    return [field.name for field in dataclasses.fields(config_class)]


# Overrides.


@pytest.mark.parametrize(
    ("setting", "part", "field", "value"),
    [
        ("num_steps=60", None, "num_steps", 60),
        ("init_from=gs://bucket/mae=1", None, "init_from", "gs://bucket/mae=1"),
        ("init_from=", None, "init_from", ""),
        ("init_from=12", None, "init_from", "12"),
        ("optimizer.peak_lr=1e-4", "optimizer", "peak_lr", 1e-4),
        ("optimizer.peak_lr=1", "optimizer", "peak_lr", 1.0),
        ("optimizer.lr_boundaries=(10, 20)", "optimizer", "lr_boundaries", (10, 20)),
        ("optimizer.lr_boundaries=10,20", "optimizer", "lr_boundaries", (10, 20)),
        ("optimizer.lr_boundaries=10", "optimizer", "lr_boundaries", (10,)),
        ("optimizer.lr_boundaries=()", "optimizer", "lr_boundaries", ()),
        ("optimizer.lr_boundaries=", "optimizer", "lr_boundaries", ()),
        ("trainable=mask_decoder", None, "trainable", ("mask_decoder",)),
        ("trainable=mask_decoder, prompt_encoder/top_left", None, "trainable",
         ("mask_decoder", "prompt_encoder/top_left")),
        ("trainable=('mask_decoder', 'image_encoder')", None, "trainable",
         ("mask_decoder", "image_encoder")),
        ("trainable='mask_decoder'", None, "trainable", ("mask_decoder",)),
        ("objective.multimask=False", "objective", "multimask", False),
        ("objective.box_noise=uniform", "objective", "box_noise", "uniform"),
        ("data.source=sa1b:/data/sa1b", "data", "source", "sa1b:/data/sa1b"),
        ("data.held_out=0::5", "data", "held_out", "0::5"),
    ],
)  # fmt: skip
def test_a_setting_replaces_one_field(setting, part, field, value):
    changed = override(CONFIG, [setting])
    before, after = (getattr(c, part) if part else c for c in (CONFIG, changed))
    assert getattr(after, field) == value
    assert type(getattr(after, field)) is type(value)
    # Nothing else changes.
    assert dataclasses.replace(after, **{field: getattr(before, field)}) == before
    assert changed == (dataclasses.replace(CONFIG, **{part: after}) if part else after)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("drop_path", "0.4", 0.4),
        ("remat", "blocks", "blocks"),
        ("image_size", "(64, 96)", (64, 96)),
        ("global_blocks", "0,1,2", (0, 1, 2)),
    ],
)
def test_a_setting_replaces_a_field_of_the_image_encoder(field, text, value):
    changed = override(CONFIG, [f"model.image_encoder.{field}={text}"])
    assert changed.model == replace_fields(MODEL, **{field: value})
    assert dataclasses.replace(changed, model=MODEL) == CONFIG


@pytest.mark.parametrize("text", ["(0.25, 1.0)", "0.25,1"])
def test_a_setting_replaces_an_optional_field(text):
    changed = override(CONFIG, [f"model.object_share={text}"])
    assert changed.model == replace_fields(MODEL, object_share=(0.25, 1.0))
    assert type(changed.model.object_share[1]) is float
    assert override(changed, ["model.object_share=None"]) == CONFIG
    with pytest.raises(ConfigError, match=r"model\.object_share must be of type"):
        override(CONFIG, ["model.object_share=0.5"])
    with pytest.raises(ConfigError, match=r"model\.object_share must be None, or"):
        override(CONFIG, ["model.object_share=0.5,0.25"])


def test_later_settings_override_earlier_ones():
    settings = ["num_steps=5", "optimizer.warmup_steps=2", "num_steps=6", "optimizer.b1=0.5"]
    changed = override(CONFIG, settings)
    assert changed == dataclasses.replace(
        CONFIG, num_steps=6, optimizer=dataclasses.replace(Optimizer(), warmup_steps=2, b1=0.5)
    )
    assert override(CONFIG, []) == CONFIG


STAGED = dataclasses.replace(
    CONFIG,
    stages=(
        Stage(start=10, objective=Interactive(num_clicks=2, focal=4.0)),
        Stage(start=20, data=Data(source="scenes", flips=True), batch_size=8),
    ),
)


def test_a_setting_is_made_in_all_stages():
    changed = override(STAGED, ["objective.dice=2", "data.source=coco:a", "batch_size=4"])
    assert changed.stages[0].objective == Interactive(num_clicks=2, focal=4.0, dice=2.0)
    assert changed.stages[1].data == Data(source="coco:a", flips=True)
    assert [part.batch_size for _, _, part in changed.parts()] == [4, 4, 4]


def test_a_stage_keeps_the_fields_that_it_shares_with_the_run():
    changed = override(STAGED, ["objective.dice=2", "data.flips=False", "trainable=mask_decoder"])
    assert (changed.stages[0].data, changed.stages[0].batch_size) == (None, None)
    assert changed.stages[1].objective is None
    assert [stage.trainable for stage in changed.stages] == [None, None]
    assert override(STAGED, ["num_steps=60"]).stages == STAGED.stages


@pytest.mark.parametrize("step", [1, -1])
def test_rules_are_checked_after_all_settings(step):
    # A patch size of 8 allows the loss scales 1 and 2.
    settings = ["objective.loss_scale=4", "model.image_encoder.patch_size=16"]
    changed = override(CONFIG, settings[::step])
    assert (changed.objective.loss_scale, changed.model.patch_size) == (4, 16)


def test_the_overridden_model_is_a_module():
    changed = override(CONFIG, ["model.image_encoder.depth=3"])
    assert changed.model == replace_fields(MODEL, depth=3)
    assert isinstance(changed.model, Sam)


@pytest.mark.parametrize(
    ("setting", "suggestion", "class_name", "config_class"),
    [
        ("num_step=3", "num_steps", "TrainConfig", TrainConfig),
        ("objective.num_click=3", "num_clicks", "Interactive", Interactive),
        ("optimizer.peak_rl=3", "peak_lr", "Optimizer", Optimizer),
        ("data.sorce=x", "source", "Data", Data),
        ("optimizers.peak_lr=3", "optimizer", "TrainConfig", TrainConfig),
        ("model.image_encoder.embed_dims=3", "embed_dim", "ImageEncoder", None),
        ("model.image_encode.depth=3", "image_encoder", "Sam", None),
    ],
)
def test_error_for_an_unknown_field_suggests_a_field_and_lists_all(
    setting, suggestion, class_name, config_class
):
    message = error_message(override, CONFIG, [setting])
    assert f"no field {setting.split('=')[0]};" in message
    assert f"did you mean {suggestion}?" in message
    listed = message.split(f"{class_name} has ")[1].split(", ")
    if config_class:
        assert listed == field_names(config_class)
    else:
        assert suggestion in listed
        assert not {"name", "parent"} & set(listed), "these are fields that Flax adds"


def test_error_for_an_unknown_field_without_a_similar_one_has_no_suggestion():
    message = error_message(override, CONFIG, ["zzz=1"])
    assert message.startswith("there is no field zzz. TrainConfig has model, data, ")
    assert error_message(override, CONFIG, ["model.name=x"]).startswith(
        "there is no field model.name"
    )


@pytest.mark.parametrize(
    ("setting", "expected_type"),
    [
        ("num_steps=1.5", "int"),
        ("num_steps=many", "int"),
        ("num_steps=True", "int"),
        ("num_steps=", "int"),
        ("optimizer.peak_lr=fast", "float"),
        ("optimizer.peak_lr=True", "float"),
        ("optimizer.lr_boundaries=1.5,2", "tuple[int, ...]"),
        ("optimizer.lr_boundaries=[1, 2]", "tuple[int, ...]"),
        ("optimizer.lr_boundaries=soon", "tuple[int, ...]"),
        ("model.image_encoder.image_size=64", "tuple[int, int]"),
        ("model.image_encoder.image_size=(64, 64, 3)", "tuple[int, int]"),
        ("objective.multimask=yes", "bool"),
        ("objective.multimask=1", "bool"),
        ("objective.box_noise=none", "typing.Literal['gaussian', 'uniform']"),
    ],
)
def test_a_value_of_a_wrong_type_is_an_error(setting, expected_type):
    path, text = setting.split("=")
    message = error_message(override, CONFIG, [setting])
    assert message == f"{path} must be of type {expected_type}; got {text!r}"


def test_setting_a_config_with_fields_is_an_error():
    message = error_message(override, CONFIG, ["optimizer=sgd"])
    fields = ", ".join(field_names(Optimizer))
    assert message == f"optimizer has fields itself: {fields}"
    assert "model has fields itself: image_encoder" in error_message(override, CONFIG, ["model=1"])


def test_setting_a_field_of_a_number_is_an_error():
    message = error_message(override, CONFIG, ["seed.high=1"])
    assert message == "seed.high: seed is a int, which has no fields"
    assert "peak_lr is a float" in error_message(override, CONFIG, ["optimizer.peak_lr.x=1"])


@pytest.mark.parametrize("setting", ["num_steps", "", "optimizer.peak_lr:1"])
def test_a_setting_without_an_equals_sign_is_an_error(setting):
    message = error_message(override, CONFIG, [setting])
    assert message == f"--set takes FIELD=VALUE; got {setting!r}"


# Files.


def test_a_config_file_is_loaded(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from sam_jax.model.sam import sam_tiny\n"
        "from train.config import Data, TrainConfig\n"
        "config = TrainConfig(model=sam_tiny(depth=3), data=Data(source='scenes'))\n"
    )
    assert load_config(str(path)) == dataclasses.replace(CONFIG, model=sam_tiny(depth=3))


def test_error_for_a_missing_file_lists_the_configs_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("sam_b.py", "sam_a.py", "__init__.py", "notes.md"):
        (tmp_path / "configs" / name).touch()
    message = error_message(load_config, "configs/sam_c.py")
    assert message == (
        "there is no config configs/sam_c.py; in configs/ there are configs/sam_a.py, "
        "configs/sam_b.py"
    )
    assert "there is no config configs;" in error_message(load_config, "configs")


@pytest.mark.parametrize(
    ("text", "got"), [("x = 1\n", "got None"), ("config = {'a': 1}\n", "got {'a': 1}")]
)
def test_a_file_without_a_config_is_an_error(tmp_path, text, got):
    path = tmp_path / "run.py"
    path.write_text(text)
    message = error_message(load_config, str(path))
    assert message.startswith(f"{path} must assign a TrainConfig to `config`")
    assert message.endswith(got)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("config = 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("config = (\n", "SyntaxError: "),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        (
            "from train.config import Data\nconfig = Data(sauce='x')\n",
            "TypeError: ",
        ),
        (
            "from sam_jax.model.sam import sam_tiny\n"
            "from train.config import Data, TrainConfig\n"
            "config = TrainConfig(model=sam_tiny(), data=Data(source='x'), batch_size=0)\n",
            "batch_size must be at least 1; got 0",
        ),
    ],
)
def test_error_for_a_file_that_fails_names_the_file_and_the_reason(tmp_path, text, reason):
    path = tmp_path / "run.py"
    path.write_text(text)
    message = error_message(load_config, str(path))
    assert str(path) in message
    assert reason in message


def test_a_file_that_is_not_python_is_an_error(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: 1\n")
    message = error_message(load_config, str(path))
    assert str(path) in message
    assert "Python" in message


# JSON.


def test_json_contains_every_field():
    plain = json.loads(to_json(CONFIG))
    assert json.dumps(plain, indent=2) + "\n" == to_json(CONFIG)
    assert list(plain) == field_names(TrainConfig)
    assert list(plain["objective"]) == field_names(Interactive)
    assert list(plain["data"]) == field_names(Data)
    assert list(plain["optimizer"]) == field_names(Optimizer)
    assert plain["model"]["image_encoder"]["image_size"] == [128, 128]
    assert plain["model"]["mask_decoder"]["dtype"] == "float32"
    assert plain["optimizer"]["lr_boundaries"] == [60_000, 86_666]
    assert plain["model"].pop("object_share") is None
    for module in (plain["model"], *plain["model"].values()):
        assert not {"name", "parent"} & set(module)


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "trainable=mask_decoder",
        "optimizer.b2=0.99",
        "objective.detach_mask=False",
        "data.held_out=0::5",
        "model.image_encoder.drop_path=0.1",
        "model.image_encoder.remat=blocks",
    ],
)
def test_json_differs_if_a_field_differs(setting):
    changed = override(CONFIG, [setting])
    assert to_json(changed) != to_json(CONFIG)
    assert to_json(override(CONFIG, [])) == to_json(CONFIG)
    # A changed line names the field.
    lines = set(to_json(changed).splitlines()) - set(to_json(CONFIG).splitlines())
    assert any(setting.split("=")[0].split(".")[-1] in line for line in lines)


def test_differences_contain_fields_and_both_values():
    settings = ["seed=1", "optimizer.b2=0.99", "trainable=mask_decoder"]
    settings.append("model.image_encoder.depth=3")
    before, after = to_dict(CONFIG), to_dict(override(CONFIG, settings))
    assert differences(before, before) == []
    assert sorted(differences(before, after)) == [
        "model.image_encoder.depth was 4, is 3",
        "optimizer.b2 was 0.999, is 0.99",
        "seed was 0, is 1",
        "trainable was [], is ['mask_decoder']",
    ]
    assert differences(before, after, ["seed", "model.image_encoder.depth", "trainable"]) == [
        "optimizer.b2 was 0.999, is 0.99"
    ]
    # A config read from JSON is equal to the original. A field that only one of them has is a
    # difference.
    assert differences(json.loads(to_json(CONFIG)), before) == []
    assert differences(before, before | {"new": 1}) == ["new was None, is 1"]


def test_fields_depend_on_the_task():
    assert override(pretraining, ["model.mask_ratio=0.5"]).model.mask_ratio == 0.5
    message = error_message(override, pretraining, ["objective.num_clicks=3"])
    assert message == "there is no field objective.num_clicks. Reconstruction has normalized"
    message = error_message(override, pretraining, ["data.min_areas=0.5"])
    assert message.startswith(
        "there is no field data.min_areas; did you mean min_area? PretrainData"
    )


# Former names.


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("objective.points=3", ["objective.num_clicks=3"]),
        ("objective.extra_rounds=1", ["objective.num_extra_rounds=1"]),
        ("objective.chunk=2", ["objective.masks_per_chunk=2"]),
        ("objective.iou_l1=True", ["objective.iou_loss=l1"]),
        ("objective.iou_l1=False", ["objective.iou_loss=mse"]),
        ("objective.iou_all=True", ["objective.iou_supervision=all"]),
        ("data.turns=True", ["data.rot90=True"]),
        ("optimizer.drop_at=5,7", ["optimizer.lr_boundaries=5,7"]),
        ("optimizer.drop_by=0.3", ["optimizer.lr_decay_factor=0.3"]),
        ("match_attention=2", ["mimetic_init_scale=2"]),
        ("train_only=mask_decoder", ["trainable=mask_decoder"]),
        ("model.depth=3", ["model.image_encoder.depth=3"]),
        ("model.decoder_mlp_dim=8", ["model.mask_decoder.mlp_dim=8"]),
        (
            "model.dtype=bfloat16",
            [
                "model.image_encoder.dtype=bfloat16",
                "model.prompt_encoder.dtype=bfloat16",
                "model.mask_decoder.dtype=bfloat16",
            ],
        ),
    ],
)
def test_former_names_are_accepted_with_a_warning(former, current, caplog):
    assert override(CONFIG, [former]) == override(CONFIG, current)
    path = current[0].split("=")[0]
    assert caplog.messages[0].startswith(f"{former.split('=')[0]} is now called {path}")


def test_decoder_fields_of_an_autoencoder_are_not_former_names(caplog):
    assert override(pretraining, ["model.decoder_depth=2"]).model.decoder_depth == 2
    assert not caplog.messages


def test_saved_configs_with_former_names_are_renamed():
    saved = {
        "model": {"prompt_dim": 64, "depth": 4, "dtype": "float32"},
        "objective": {"points": 8, "iou_l1": True, "iou_all": False},
        "data": {"source": "scenes", "turns": False},
        "train_only": [],
    }
    assert rename_saved(saved) == {
        "model": {
            "image_encoder": {"out_dim": 64, "depth": 4, "dtype": "float32"},
            "prompt_encoder": {"dim": 64, "dtype": "float32"},
            "mask_decoder": {"dim": 64, "dtype": "float32"},
        },
        "objective": {"num_clicks": 8, "iou_loss": "l1", "iou_supervision": "best"},
        "data": {"source": "scenes", "rot90": False},
        "trainable": [],
    }


@pytest.mark.parametrize("config", [CONFIG, pretraining])
def test_current_names_are_kept(config, caplog):
    saved = json.loads(to_json(config))
    assert rename_saved(saved) == saved
    assert not caplog.messages
