"""Training only some parts of a model."""

import jax
import numpy as np

from sam_jax.data.loader import Loader
from sam_jax.data.open import open_source
from sam_jax.data.segmentation_batch import SegmentationTransform
from sam_jax.model.init import init_variables
from sam_jax.model.sam import sam_tiny
from train.config import Interactive, Optimizer
from train.objectives.interactive import InteractiveObjective
from train.optimizer import is_trainable, make_optimizer, map_paths
from train.sharding import init_sharded, make_mesh, shard_batch
from train.state import init_state
from train.step import make_step

MODEL = sam_tiny(image_size=(32, 32), depth=4, embed_dim=16, prompt_dim=16, global_blocks=(3,),
                 window_size=2, decoder_depth=1, decoder_mlp_dim=16)  # fmt: skip


def lower_first_step(trainable):
    """Returns the lowered step, its state and its batch for some parts to train."""
    loader = Loader(
        open_source("scenes"), np.arange(4), SegmentationTransform(MODEL.image_size, 2), 2, seed=0
    )
    mesh = make_mesh(2, devices=jax.devices()[:1])
    optimizer = make_optimizer(Optimizer(), MODEL.image_encoder.depth, trainable)
    variables = jax.jit(init_variables, static_argnums=(0, 1))(MODEL, 0)
    state = init_sharded(mesh, lambda x: init_state(x, optimizer), variables)
    one_round = Interactive(masks_per_image=2, num_clicks=0, num_extra_rounds=0)
    objective = InteractiveObjective(MODEL, one_round)
    batch = shard_batch(mesh, loader.batch(0)[0])
    step = make_step(objective, optimizer, 0, mesh, state, trainable=trainable)
    return step.lower(state, batch), state, batch


def test_only_the_parts_to_train_change_and_the_others_cost_no_backward_pass():
    trainable = ("image_encoder/block_03", "image_encoder/neck", "mask_decoder")
    everything, _, _ = lower_first_step(())
    step, state, batch = lower_first_step(trainable)
    flops = [program.cost_analysis()["flops"] for program in (everything, step)]
    assert flops[1] < 0.9 * flops[0]

    before = jax.device_get(state.params)
    state, values = step.compile()(state, batch)
    after = jax.device_get(state.params)
    is_changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    is_trained = map_paths(lambda path: is_trainable(path, trainable), before)
    assert not any(jax.tree.leaves(jax.tree.map(lambda x, y: x and not y, is_changed, is_trained)))
    assert is_changed["image_encoder"]["block_03"]["lin1"]["kernel"]
    assert values["gradient_norm"] > 0
