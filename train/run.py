"""A training run, top to bottom."""

from pathlib import Path

import jax
from jax.sharding import Mesh

import sam_jax
from sam_jax.data.loader import Loader
from sam_jax.data.open import Subset, exclude, open_source, select
from train.checkpoints import MAX_TO_KEEP, Checkpoints
from train.config import TrainConfig
from train.flops import peak_flops
from train.initialization import initial_variables
from train.metrics import Metrics, summarize
from train.optimizer import make_optimizer
from train.remote_workdir import RemoteWorkdir
from train.sharding import init_sharded, make_mesh, process_allgather, shard_batch, sync_hosts
from train.state import TrainState, init_state
from train.step import make_step
from train.tasks.base import Task, task_of
from train.workdir import BadSamples, claim, write_json


def run(config: TrainConfig, workdir: str | Path) -> None:
    """Trains, or goes on with what was begun in the workdir; then evaluates and reports.

    The workdir then holds config.json, metrics.jsonl, tensorboard/, checkpoints/, weights/ (for
    `sam_jax.load`), evaluation.json, report/, and bad_samples.jsonl and profile/ if there were any.

    A workdir may be in an object store (gs://...), see `outbox.py`.

    Of several hosts, each reads its share of every batch and saves its pieces of the checkpoints.
    The variables are gathered on all of them for evaluations; these, and all other writing, are the
    first host's, for which the others wait.

    Raises:
      ConfigError, SourceError: before anything is written, if the run cannot be.
    """
    task = task_of(config)
    seen, held_out = open_data(config, task)
    mesh = make_mesh(config.batch_size, config.fsdp)
    variables = initial_variables(config, task.initialize)
    with RemoteWorkdir(workdir) as outbox:
        outbox.fetch()
        needed = task.bytes_on_disk(seen) + bytes_on_disk(variables, outbox.is_remote)
        claim(outbox.folder, config, needed, is_first_host(), outbox.address)
        outbox.send()
        learn(config, task, outbox, mesh, variables, seen, held_out)
    if is_first_host():
        print(
            f"report: {outbox.address}/report/index.html",
            f"weights: {outbox.address}/weights",
            sep="\n",
        )
    sync_hosts("the run's end")


def learn(
    config: TrainConfig,
    task: Task,
    outbox: RemoteWorkdir,
    mesh: Mesh,
    variables: dict,
    seen: Subset,
    held_out: Subset,
) -> None:
    """Trains on the images that are `seen`, from the newest checkpoint or the variables."""
    folder = outbox.folder
    optimizer = make_optimizer(config.optimizer, task.encoder_depth, config.trainable)
    checkpoints = Checkpoints(outbox.checkpoints)
    state = init_sharded(mesh, lambda given: init_state(given, optimizer), variables)
    step = make_step(task.objective, optimizer, config.seed, mesh, state, config.model.dtype)
    state = checkpoints.restore(state) or state
    start = int(state.step)

    batches = make_loader(config, task, seen).batches(start, config.num_steps, config.data.workers)
    complete = task.completion(variables, folder / own("embeddings.npy"), seen)
    del variables  # the state has its own, in pieces
    bad = BadSamples(folder / own("bad_samples.jsonl"), config.data.max_bad, len(seen))
    metrics = None
    if is_first_host():
        ideal = seconds_at_peak(config, task, mesh)
        metrics = Metrics(folder, start, config.num_steps, config.batch_size, ideal)
        batches = metrics.timed(batches)
    for done, (batch, problems) in enumerate(batches, start=start + 1):
        bad.add(problems)
        if metrics and done in config.profile[:1]:
            jax.profiler.start_trace(folder / "profile")
        state, values = step(state, shard_batch(mesh, complete(batch)))
        is_last = done == config.num_steps
        if metrics and done in config.profile[1:]:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
        if metrics:
            metrics.advance()
            if is_last or done % config.log_every == 0:
                metrics.log(done, summarize(jax.device_get(values)))
        if not is_last and config.evaluate_every and done % config.evaluate_every == 0:
            variables = variables_of(mesh, state)
            if metrics:
                metrics.log_evaluation(done, task.evaluate(variables, held_out))
        if is_last or done % config.checkpoint_every == 0:
            outbox.send()
            checkpoints.save(done, state)
    checkpoints.close()
    variables = variables_of(mesh, state)
    if metrics:
        metrics.close()
        conclude(config, task, folder, variables, held_out)


def is_first_host() -> bool:
    """Whether this is the host that writes."""
    return jax.process_index() == 0


def conclude(
    config: TrainConfig, task: Task, workdir: Path, variables: dict, held_out: Subset
) -> None:
    """Saves the weights, evaluates them, and reports."""
    sam_jax.save(workdir / "weights", config.model, variables)
    where = {"source": config.data.source, "index": config.data.held_out or ":"}
    evaluation = where | task.evaluate(variables, held_out)
    write_json(workdir / "evaluation.json", evaluation)
    task.report(workdir, variables, held_out, evaluation)


def open_data(config: TrainConfig, task: Task) -> tuple[Subset, Subset]:
    """The images to learn from, and those to evaluate on: the same ones where none are held out.

    Those to evaluate on are always decoded in full.
    """
    source = open_source(config.data.source, decode_size=task.decode_size, masks=task.needs_masks)
    whole = open_source(config.data.source, masks=task.needs_masks)
    if not config.data.held_out:
        return select(source, ":"), select(whole, ":")
    return exclude(source, config.data.held_out), select(whole, config.data.held_out)


def make_loader(config: TrainConfig, task: Task, selection: Subset) -> Loader:
    """The loader of the images to learn from."""
    return Loader(
        source=selection.source,
        indices=selection.indices,
        transform=task.transform,
        batch_size=config.batch_size,
        seed=config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def seconds_at_peak(config: TrainConfig, task: Task, mesh: Mesh) -> float | None:
    """Of a step, if the devices did nothing but the reference's operations; None if unknown."""
    devices = mesh.devices.flatten()
    peak = peak_flops(devices[0].device_kind)
    if peak is None or task.flops is None:
        return None
    return config.batch_size * task.flops / peak / len(devices)


def bytes_on_disk(variables: dict, is_remote: bool) -> int:
    """What any run will write: weights; and checkpoints of parameters and two moments.

    Those of a workdir that is not on this machine are not written here.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    return size if is_remote else (3 * (MAX_TO_KEEP + 1) + 1) * size


def variables_of(mesh: Mesh, state: TrainState) -> dict:
    """The model's variables, whole, on one device of every host."""
    variables = process_allgather(mesh, {"params": state.params, "constants": state.constants})
    return jax.device_put(variables, jax.local_devices()[0])


def own(name: str) -> str:
    """The name of a file of which every host has its own."""
    path = Path(name)
    return f"{path.stem}_{jax.process_index()}{path.suffix}" if jax.process_index() else name
