"""A training run from top to bottom."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import sam_jax
from sam_jax.data.loader import Loader
from sam_jax.data.open import Subset, exclude, open_source, select, with_full_size
from train.checkpoints import MAX_TO_KEEP, Checkpoints
from train.config import TrainConfig
from train.flops import peak_flops
from train.metrics import Metrics, summarize
from train.optimizer import check_trainable, make_optimizer
from train.remote_workdir import RemoteWorkdir
from train.sharding import init_sharded, make_mesh, process_allgather, shard_batch, sync_hosts
from train.state import TrainState, init_state
from train.step import make_step
from train.tasks.base import Task, make_task
from train.workdir import BadSamples, check_or_create, write_evaluation


def run(config: TrainConfig, workdir: str | Path) -> None:
    """Trains, or resumes the run in the workdir; then evaluates and reports.

    Afterwards the workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/, weights/
    (for `sam_jax.load`), evaluation.json and report/; also bad_samples.jsonl and profile/ if there
    were any. It may be in an object store (gs://...), see `remote_workdir.py`.

    On several hosts, each host reads its share of every batch and saves its shards of the
    checkpoints. The variables are gathered on all hosts for evaluations. The lead host evaluates
    and does all other writing while the others wait.

    Args:
      config: The run.
      workdir: A new folder, or that of a run with the same configuration.

    Raises:
      ConfigError: If the run is not possible. Nothing is written then.
      SourceError: If the images cannot be opened. Nothing is written then.
    """
    # The task, the images, the devices and the initial variables.
    task = make_task(config)
    train_split, eval_split = open_data(config, task)
    mesh = make_mesh(config.batch_size, config.fsdp)
    variables = task.initial_variables()
    check_trainable(variables["params"], config.trainable)

    with RemoteWorkdir(workdir) as remote:
        remote.pull()
        num_bytes = task.bytes_on_disk(train_split) + bytes_on_disk(variables, remote.is_remote)
        check_or_create(remote.folder, config, num_bytes, is_lead_host(), remote.address)
        remote.push()
        state = train_loop(config, task, remote, mesh, variables, train_split, eval_split)
        variables = gather_variables(mesh, state)
        if is_lead_host():
            finalize(config, task, remote.folder, variables, eval_split)
    if is_lead_host():
        print(f"report: {remote.address}/report/index.html")
        print(f"weights: {remote.address}/weights")
    sync_hosts("end of the run")


def train_loop(
    config: TrainConfig,
    task: Task,
    remote: RemoteWorkdir,
    mesh: Mesh,
    variables: dict[str, Any],
    train_split: Subset,
    eval_split: Subset,
) -> TrainState:
    """Trains from the newest checkpoint, or from the given variables.

    Args:
      config: The run.
      task: Its task.
      remote: Its workdir.
      mesh: Its devices.
      variables: The variables to start from.
      train_split: The images to train on.
      eval_split: The images to evaluate on.

    Returns:
      The last state.
    """
    # The state, created on its devices, and the step, compiled for its sharding.
    optimizer = make_optimizer(config.optimizer, task.encoder_depth, config.trainable)
    state = init_sharded(mesh, lambda variables: init_state(variables, optimizer), variables)
    step = make_step(task.objective, optimizer, config.seed, mesh, state, config.model.dtype)

    # The newest checkpoint, if there is one.
    checkpoints = Checkpoints(remote.checkpoints)
    state = checkpoints.restore(state) or state
    start = int(state.step)

    # The batches from this step on. They depend on the seed and the step only.
    cache_path = remote.folder / per_host_name("embeddings.npy")
    batch_transform = task.batch_transform(variables, cache_path, train_split)
    del variables  # the state has a sharded copy
    loader = make_loader(config, task, train_split)
    batches = loader.batches(start, config.num_steps, config.data.workers)
    bad_samples = BadSamples(
        remote.folder / per_host_name("bad_samples.jsonl"), config.data.max_bad, len(train_split)
    )

    # The lead host logs.
    metrics = None
    if is_lead_host():
        peak_seconds = peak_step_seconds(config, task, mesh)
        metrics = Metrics(remote.folder, start, config.num_steps, config.batch_size, peak_seconds)
        batches = metrics.timed(batches)

    def evaluate(done: int, state: TrainState) -> None:
        variables = gather_variables(mesh, state)
        if metrics:
            metrics.log_evaluation(done, task.evaluate(variables, eval_split))

    for done, (batch, skipped) in enumerate(batches, start=start + 1):
        bad_samples.add(skipped)
        if metrics and done in config.profile[:1]:
            jax.profiler.start_trace(remote.folder / "profile")
        state, values = step(state, shard_batch(mesh, batch_transform(batch)))
        if metrics and done in config.profile[1:]:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
        if metrics:
            metrics.advance()
        # Everything is due by step and never by the clock, so that all hosts do it together.
        is_last = done == config.num_steps
        if metrics and (is_last or done % config.log_every == 0):
            metrics.log(done, summarize(jax.device_get(values)))
        if not is_last and config.evaluate_every and done % config.evaluate_every == 0:
            evaluate(done, state)
        if is_last or done % config.checkpoint_every == 0:
            remote.push()
            checkpoints.save(done, state)
    checkpoints.close()
    if metrics:
        metrics.close()
    return state


def finalize(
    config: TrainConfig,
    task: Task,
    workdir: Path,
    variables: dict[str, Any],
    eval_split: Subset,
) -> None:
    """Saves the weights, evaluates them, and writes the report."""
    sam_jax.save(workdir / "weights", config.model, variables)
    where = {"source": config.data.source, "index": config.data.held_out or ":"}
    evaluation = where | task.evaluate(variables, eval_split)
    write_evaluation(workdir, evaluation)
    task.report(workdir, variables, eval_split, evaluation)


def open_data(config: TrainConfig, task: Task) -> tuple[Subset, Subset]:
    """Opens the images.

    Args:
      config: The run.
      task: Its task.

    Returns:
      The images to train on, and those to evaluate on, which are always decoded in full. They are
      the same if no images are held out.

    Raises:
      SourceError: If the images cannot be opened.
    """
    source = open_source(config.data.source, decode_size=task.decode_size, masks=task.needs_masks)
    full_size = with_full_size(source)
    if not config.data.held_out:
        return select(source, ":"), select(full_size, ":")
    return exclude(source, config.data.held_out), select(full_size, config.data.held_out)


def make_loader(config: TrainConfig, task: Task, split: Subset) -> Loader:
    """Makes the loader of this host's rows of the batches."""
    return Loader(
        source=split.source,
        indices=split.indices,
        transform=task.transform,
        batch_size=config.batch_size,
        seed=config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def peak_step_seconds(config: TrainConfig, task: Task, mesh: Mesh) -> float | None:
    """Returns the seconds per step at peak FLOP/s for the reference's operation count.

    Returns None if the peak of the devices or the operation count is unknown.
    """
    devices = mesh.devices.flatten()
    peak = peak_flops(devices[0].device_kind)
    if peak is None or task.flops is None:
        return None
    return config.batch_size * task.flops / peak / len(devices)


def bytes_on_disk(variables: dict[str, Any], is_remote: bool) -> int:
    """Returns the number of bytes that a run writes: weights, and checkpoints if it is local.

    A checkpoint holds the parameters and the optimizer's two moments. While one is being written,
    there is one more than the manager keeps.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    return size if is_remote else (3 * (MAX_TO_KEEP + 1) + 1) * size


def gather_variables(mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """Copies the model's variables to one device of every host."""
    variables = process_allgather(mesh, {"params": state.params, "constants": state.constants})
    return jax.device_put(variables, jax.local_devices()[0])


def is_lead_host() -> bool:
    """Returns True on the host that writes."""
    return jax.process_index() == 0


def per_host_name(name: str) -> str:
    """Inserts the process index into a file name, except on the lead host."""
    path = Path(name)
    return f"{path.stem}_{jax.process_index()}{path.suffix}" if jax.process_index() else name
