"""The cost of a compiled TPU program: time, kernels and collectives, as its text states them.

The compiler annotates its instructions with "estimated_cycles". This is an estimate and not a
measurement: it ranks programs. Instructions in loops count as often as they run.

Kernels carry no estimate. A lower bound of their time follows from the cost that is stated next to
each kernel (`sam_jax/model/ops`): from the schedules of their inner loops, which the compiler
writes, from their matrix products, or from their memory traffic.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from sam_jax.model.ops.dispatch import kernel_costs
from sam_jax.model.ops.kernel_cost import Cost, CostFunction
from train.aot.chips import Chip

NO_ESTIMATE = 2**62  # the compiler writes estimates of at least this where it has none
KERNEL_TARGET = "tpu_custom_call"
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
ASYNC_ATTRIBUTE = "async_collective_name"  # of collectives that the compiler made asynchronous
BYTES_PER_ELEMENT = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
}  # fmt: skip
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(")


@dataclasses.dataclass
class Instruction:
    """One line of a program.

    Attributes:
      name: The name of the result, without "%".
      opcode: The operation.
      shape: The shape of the result, as text.
      scope: The scope in the source, "" if unknown.
      text: The full line.
    """

    name: str
    opcode: str
    shape: str
    scope: str
    text: str


@dataclasses.dataclass
class ProgramCost:
    """The cost of a program on one device.

    Attributes:
      seconds: Estimated time of each phase, without kernels.
      kernel_seconds_bound: Lower bound of the time of the kernels of each phase.
      unmodeled_kernels: Names of kernels without a known cost, whose time is missing.
      collectives: For each kind {"count", "bytes", "asynchronous", "phases"}: their number, their
        bytes in total, how many of them overlap with other work, and the phases they occur in.
        Collectives that the compiler has fused with other work are not counted.
    """

    seconds: dict[str, float]
    kernel_seconds_bound: dict[str, float]
    unmodeled_kernels: list[str]
    collectives: dict[str, dict[str, Any]]

    @property
    def total_seconds(self) -> float:
        """The time of all phases, with kernels."""
        return sum(self.seconds.values(), 0.0) + self.total_kernel_seconds_bound

    @property
    def total_kernel_seconds_bound(self) -> float:
        """The time of the kernels of all phases."""
        return sum(self.kernel_seconds_bound.values(), 0.0)


def estimate_cost(text: str, chip: Chip, phases: Mapping[str, str]) -> ProgramCost:
    """Estimates the cost of a program.

    Args:
      text: The text of the compiled program.
      chip: The chip that it was compiled for.
      phases: Names of phases, and patterns of the scopes that belong to them. Instructions in none
        of these scopes belong to the phase "other".

    Returns:
      The cost on one device.
    """
    computations, entry = read_program(text)
    costs = kernel_costs()
    seconds: dict[str, float] = defaultdict(float)
    kernel_seconds: dict[str, float] = defaultdict(float)
    collectives: dict[str, Counter] = defaultdict(Counter)
    collective_phases: dict[str, set[str]] = defaultdict(set)
    unmodeled: set[str] = set()
    for instruction, times in walk(computations, entry):
        phase = phase_of(instruction, phases)
        if (cycles := estimated_cycles(instruction)) is not None:
            seconds[phase] += times * cycles / chip.cycles_per_second
        elif KERNEL_TARGET in instruction.text:
            bound = kernel_seconds_bound(instruction, chip, costs)
            if bound is None:
                unmodeled.add(instruction.name.split(".")[0])
            else:
                kernel_seconds[phase] += times * bound
        kind = next((k for k in COLLECTIVES if instruction.opcode.startswith(k)), None)
        if kind and not instruction.opcode.endswith("-done"):
            is_async = instruction.opcode.endswith("-start") or ASYNC_ATTRIBUTE in instruction.text
            collectives[kind].update(
                count=times,
                bytes=times * bytes_of(instruction.shape),
                asynchronous=times * is_async,
            )
            collective_phases[kind].add(phase)
    return ProgramCost(
        seconds=dict(seconds),
        kernel_seconds_bound=dict(kernel_seconds),
        unmodeled_kernels=sorted(unmodeled),
        collectives={
            kind: dict(counts) | {"phases": sorted(collective_phases[kind])}
            for kind, counts in collectives.items()
        },
    )


def phase_of(instruction: Instruction, phases: Mapping[str, str]) -> str:
    """Returns the first phase whose pattern occurs in the scope of an instruction."""
    matches = (name for name, scope in phases.items() if re.search(scope, instruction.scope))
    return next(matches, "other")


def read_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations of a program by name, and the name of its entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    # The metadata of kernels occupies several lines.
    text = re.sub(r"kernel_metadata=\{\n(.*)\n\}", r"kernel_metadata={\1}", text)
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := re.match(INSTRUCTION, line)):
            scope = re.search(r'op_name="([^"]*)"', line)
            current.append(
                Instruction(found[1], found[3], found[2], scope[1] if scope else "", line)
            )
    return computations, entry


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """Returns how often a loop runs: as annotated, or the largest constant in its condition."""
    if known := re.search(r"known_trip_count\D+(\d+)", loop.text):
        return int(known[1])
    condition = _called(loop, "condition")
    constants = [re.search(r"constant\((\d+)\)", i.text) for i in computations[condition]]
    return max((int(c[1]) for c in constants if c), default=1)


def walk(
    computations: Mapping[str, list[Instruction]], entry: str
) -> Iterator[tuple[Instruction, int]]:
    """Yields every instruction outside fusions, and how often it runs.

    Only the most expensive branch of a conditional counts.
    """

    def visit(name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in computations[name]:
            yield instruction, times
            if instruction.opcode == "while":
                count = trip_count(instruction, computations)
                yield from visit(_called(instruction, "body"), times * count)
            elif instruction.opcode in ("call", "conditional"):
                branches = [list(visit(name, times)) for name in _branches(instruction)]
                yield from max(branches, key=_total_cycles, default=[])

    yield from visit(entry, 1)


def _total_cycles(executed: list[tuple[Instruction, int]]) -> int:
    return sum(times * (estimated_cycles(instruction) or 0) for instruction, times in executed)


def estimated_cycles(instruction: Instruction) -> int | None:
    """Returns the compiler's estimate for one execution; None if it has none."""
    estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
    return int(estimate[1]) if estimate and int(estimate[1]) < NO_ESTIMATE else None


def _branches(instruction: Instruction) -> list[str]:
    """Returns the names of the branches of a conditional, or of the computation of a call."""
    lists = re.findall(r"branch_computations=\{([^}]*)\}", instruction.text)
    single = re.findall(r"(?:to_apply|_computation)=(%[^\s,]+)", instruction.text)
    return re.findall(r"%([^\s,]+)", " ".join(lists + single))


def _called(loop: Instruction, role: str) -> str:
    """Returns the name of the "body" or "condition" of a loop."""
    found = re.search(rf"{role}=%([^\s,]+)", loop.text)
    if found is None:
        raise ValueError(f"a while instruction must name its {role}; got {loop.text.strip()}")
    return found[1]


def bytes_of(shape: str) -> int:
    """Returns the bytes of the arrays of a shape, which is given as text."""
    total = 0
    for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * BYTES_PER_ELEMENT.get(kind, 4)
    return total


def kernel_seconds_bound(
    kernel: Instruction, chip: Chip, costs: Mapping[str, CostFunction]
) -> float | None:
    """Returns a lower bound of the time of a kernel; None if its cost is not known.

    Args:
      kernel: The instruction that calls it.
      chip: The chip that it runs on.
      costs: Cost functions by the name of the kernel.

    Returns:
      Seconds of one call.
    """
    cost_function = next((f for name, f in costs.items() if name in kernel.name), None)
    if cost_function is None:
        return None
    found = re.search(r"operand_layout_constraints=\{(.*?)\}\}", kernel.text)
    operands = found[1] if found else ""
    shapes = [
        [int(side) for side in sides.split(",")]
        for sides in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", operands)
    ]
    cost = cost_function(shapes, bytes_of(operands) + bytes_of(kernel.shape))
    return None if cost is None else cost_seconds(cost, chip)


def cost_seconds(cost: Cost, chip: Chip) -> float:
    """Returns the seconds that a chip needs at least for a cost."""
    return max(
        cost.cycles / chip.cycles_per_second,
        cost.bytes / chip.hbm_bandwidth,
        cost.attention_flops / chip.peak_flops / chip.splash_efficiency,
    )
