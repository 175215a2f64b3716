"""What the TPU compiler says of a program that it has compiled: time, memory, collectives.

The compiler annotates what it emits with its own model of the time, "estimated_cycles". It is no
measurement; it ranks programs, and a change in it is worth an explanation. Loops count as often as
they run. Kernels have no such figure; their time is bounded: by the schedules of their inner loops
that the compiler writes, by their matrix products at the rate that those show, or by their traffic.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from typing import Any

from train.flops import PEAKS

GIB = 2**30
UNKNOWN = 2**62  # an estimate of this and more is the compiler's word for none
KERNEL = "tpu_custom_call"
LANES = 128  # channels are filled up to a multiple of it
# Products with queries' and with values' channels in JAX's splash attention, by kernel.
SPLASH = {"splash_mha_fwd": (1, 1), "splash_mha_dkv": (3, 2)}
# Bundles, of a cycle each, that the compiler schedules in our own kernels on v5e, by
# --xla_jf_dump_llo_text. Of a head of one window of 14 x 14: 792 and 853 (of 64 and 80 channels),
# 1871 and 1969. Two windows' time goes by before and after the first and the last are in memory.
WINDOWS = {"window_attention_forward": 853, "window_attention_backward": 1969}
# Of 1024 pixels of 256 channels, attended to by, or to, 15 tokens with 8 heads.
PIXELS = {
    "token_to_image_forward": 1875,
    "token_to_image_backward": 3123,
    "image_to_token_forward": 2768,
    "image_to_token_backward": 6665,
    "upscaling_forward": 5217,
    "upscaling_backward": 12412,
}
# Of an image's attention among its (tokens, channels of all heads): forward, and backward.
TOKENS = {
    (50, 768): {"token_attention_forward": 1210, "token_attention_backward": 2475},
    (50, 1024): {"token_attention_forward": 1338, "token_attention_backward": 3365},
    (50, 1280): {"token_attention_forward": 1785, "token_attention_backward": 3857},
    (197, 512): {"token_attention_forward": 5080, "token_attention_backward": 12792},
}
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
ASYNCHRONOUS = "async_collective_name"  # which the compiler gives those that it has split
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, as `topology` names hold it; sources: `jax/_src/tpu_info.py`, its datasheet."""

    flops: float  # a second, bfloat16
    hbm: float  # bytes
    flops_per_cycle: int
    bandwidth: float  # bytes a second, of its memory
    attention: float  # of the peak, in splash attention


CHIPS = {
    "v4": Chip(PEAKS["TPU v4"], 32 * GIB, 262144, 1.23e12, attention=0.7),
    "v5e": Chip(PEAKS["TPU v5 lite"], 16 * GIB, 131072, 0.82e12, attention=0.7),
    "v5p": Chip(PEAKS["TPU v5"], 95 * GIB, 262144, 2.76e12, attention=0.7),
    "v6e": Chip(PEAKS["TPU v6 lite"], 32 * GIB, 524288, 1.64e12, attention=0.4),
}


@dataclasses.dataclass
class Instruction:
    """A line of a program: its opcode, shape, scope in the source, and the rest of the text."""

    name: str
    opcode: str
    shape: str
    scope: str
    text: str


def read_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program's text by name, and the name of its entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    text = re.sub(
        r"kernel_metadata=\{\n(.*)\n\}", r"kernel_metadata={\1}", text
    )  # lines of its own
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


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(")


def trip_count(loop: Instruction, computations: dict) -> int:
    """How often a loop runs: as annotated, or else the largest constant in its condition."""
    if known := re.search(r"known_trip_count\D+(\d+)", loop.text):
        return int(known[1])
    condition = re.search(r"condition=%([^\s,]+)", loop.text)[1]
    constants = [re.search(r"constant\((\d+)\)", i.text) for i in computations[condition]]
    return max((int(c[1]) for c in constants if c), default=1)


def walk(computations: dict, entry: str):
    """Every instruction that runs, outside fusions, with how often: (`Instruction`, int)."""

    def visit(name, times):
        for instruction in computations[name]:
            yield instruction, times
            if instruction.opcode == "while":
                body = re.search(r"body=%([^\s,]+)", instruction.text)[1]
                yield from visit(body, times * trip_count(instruction, computations))
            elif instruction.opcode in ("call", "conditional"):
                for called in re.findall(r"(?:to_apply|_computation)=%([^\s,]+)", instruction.text):
                    yield from visit(called, times)

    yield from visit(entry, 1)


def bytes_of(shape: str) -> int:
    """Bytes of the arrays of a shape as a program's text has it."""
    total = 0
    for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * BYTES.get(kind, 4)
    return total


@dataclasses.dataclass
class Modelled:
    """What a program costs a device.

    Attributes:
      seconds: by phase, in which no kernel is.
      kernel_seconds: by phase, of the kernels that `kernel_seconds` knows.
      unbounded: names of other kernels, whose time is missing.
      collectives: by kind, {"count", "bytes", "asynchronous", "phases"}: how many, of how many
        bytes in all, how many of them run beside other work, and in which phases they are. Those
        that the compiler has fused with other work are not among them.
    """

    seconds: dict[str, float]
    kernel_seconds: dict[str, float]
    unbounded: list[str]
    collectives: dict[str, dict[str, Any]]


def model_program(text: str, chip: Chip, phases: dict[str, str]) -> Modelled:
    """Reads the compiler's estimates.

    Args:
      text: of the compiled program.
      phases: names, and patterns of the scopes in them; what lies in none is of the phase "other".
    """
    computations, entry = read_program(text)
    second = chip.flops / chip.flops_per_cycle  # cycles of one
    seconds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    collectives: dict[str, Counter] = defaultdict(Counter)
    crossed: dict[str, set[str]] = defaultdict(set)
    unbounded: set[str] = set()
    for instruction, times in walk(computations, entry):
        within = (name for name, scope in phases.items() if re.search(scope, instruction.scope))
        phase = next(within, "other")
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
        if estimate and int(estimate[1]) < UNKNOWN:
            seconds[phase] += times * int(estimate[1]) / second
        elif KERNEL in instruction.text:
            if (found := kernel_seconds(instruction, chip)) is None:
                unbounded.add(instruction.name.split(".")[0])
            else:
                kernels[phase] += times * found
        kind = next((k for k in COLLECTIVES if instruction.opcode.startswith(k)), None)
        if kind and not instruction.opcode.endswith("-done"):
            starts = instruction.opcode.endswith("-start") or ASYNCHRONOUS in instruction.text
            collectives[kind].update(
                count=times, bytes=times * bytes_of(instruction.shape), asynchronous=times * starts
            )
            crossed[kind].add(phase)
    all_kinds = {k: dict(c) | {"phases": sorted(crossed[k])} for k, c in collectives.items()}
    return Modelled(dict(seconds), dict(kernels), sorted(unbounded), all_kinds)


def kernel_seconds(kernel: Instruction, chip: Chip) -> float | None:
    """The time of JAX's splash attention or of a kernel of ours; None for any other kernel."""
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}\}", kernel.text)
    shapes = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", operands[1] if operands else "")
    sides = [[int(side) for side in shape.split(",")] for shape in shapes]
    for name, (of_keys, of_values) in SPLASH.items():
        if kernel.name.startswith(name):
            (heads, tokens, key), _, (*_, value) = sides[:3]
            whole = lambda channels: -(-channels // LANES) * LANES
            channels = of_keys * whole(key) + of_values * whole(value)
            return 2 * heads * tokens**2 * channels / chip.flops / chip.attention
    second = chip.flops / chip.flops_per_cycle  # cycles of one
    for name, cycles in PIXELS.items():
        if name in kernel.name:
            *objects, c, pixels = max(sides, key=lambda shape: shape[-1])  # of the image
            count = math.prod(objects)
            moved = bytes_of(operands[1]) + bytes_of(kernel.shape)
            if [c, pixels] in sides:  # positions, which are read for every object
                moved += (count - 1) * bytes_of(f"bf16[{c},{pixels}]")
            return max(cycles * count * pixels / 1024 / second, moved / chip.bandwidth)
    if found := re.search("token_attention_(?:forward|backward)", kernel.name):
        images, tokens, channels = sides[0]
        if (tokens, channels // 3) not in TOKENS:
            return None
        cycles = TOKENS[tokens, channels // 3][found[0]] * (images + 2)
        return max(
            cycles / second, (bytes_of(operands[1]) + bytes_of(kernel.shape)) / chip.bandwidth
        )
    for name, cycles in WINDOWS.items():
        if kernel.name.startswith(name):
            windows, _, channels = sides[0]
            of_head = next(shape for shape in sides if len(shape) == 2)[0]
            heads = channels // 3 // of_head
            return cycles * heads * (windows + 2) / second
    return None
