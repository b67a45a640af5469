"""What each device of a compiled program sends, moves to and from its main memory, and runs, read from the HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
SIZES = {"pred": 1, "bf16": 2, "f16": 2} | {f"{kind}{bits}": bits // 8 for kind in "fsu" for bits in (8, 16, 32, 64)}
ONCE, LOOP, BRANCH = "once", "loop", "branch"
PLACES: tuple[str, ...] = (ONCE, LOOP, BRANCH)  # run once a step, in each round of a loop, in a branch of a conditional
CALLS = "calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
BRANCHES = ("while", "conditional")
CALLERS = ("call", "async-start", *BRANCHES)
TRANSFERS = ("copy-start", "slice-start")  # to or from memory on the chip, while something else runs
WITHOUT_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


class Array(NamedTuple):
    """One array as each device holds it; memory space 0 is the main memory, others are on the chip."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        return SIZES.get(self.dtype, 0) * math.prod(self.shape)


class Instruction(NamedTuple):
    opcode: str
    results: list[Array]
    operands: list[Array]
    calls: list[str]
    joins_slices: bool  # slices that were moved one by one become one array where they lie


class Collective(NamedTuple):
    kind: str
    place: str
    operands: list[Array]

    @property
    def bytes(self) -> int:
        return sum(operand.bytes for operand in self.operands)


def collectives(text: str) -> list[Collective]:
    """All collectives that the program reaches; of an asynchronous pair the start."""
    found = ((place, instruction.opcode.removesuffix("-start"), instruction) for place, instruction in reach(text))
    return [Collective(kind, place, instruction.operands) for place, kind, instruction in found if kind in KINDS]


def sent(kind: str, size: int, devices: int) -> float:
    """Bytes each device sends for a collective of `size` bytes a device, with the devices in a ring."""
    others = devices - 1
    share = others / devices
    factors = {"all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share, "all-gather": others}
    return factors.get(kind, 1) * size


def traffic(text: str) -> dict[str, int]:
    """Bytes read from and written to main memory, by place; of a conditional all branches are counted."""
    total = dict.fromkeys(PLACES, 0)
    for place, instruction in reach(text):
        if instruction.opcode in TRANSFERS:
            # One result is what is moved, the other the whole that it is taken from.
            total[place] += min(array.bytes for array in instruction.results[:2])
        elif instruction.opcode not in CALLERS and not instruction.joins_slices:
            arrays = instruction.results + instruction.operands
            total[place] += sum(array.bytes for array in arrays if array.space == 0)
    return total


def branches(text: str) -> int:
    """Conditionals and loops that the program reaches."""
    return sum(instruction.opcode in BRANCHES for _, instruction in reach(text))


def kernels(text: str) -> Counter[str]:
    """Instructions that become a kernel of their own, by opcode: fusions, and what else computes with an array."""
    return Counter(instruction.opcode for _, instruction in reach(text) if is_kernel(instruction))


def is_kernel(instruction: Instruction) -> bool:
    is_message = instruction.opcode.removesuffix("-start") in KINDS
    if is_message or instruction.opcode in (*CALLERS, *TRANSFERS) or instruction.joins_slices:
        return False
    arrays = instruction.results + instruction.operands
    return instruction.opcode == "fusion" or any(math.prod(array.shape) > 1 for array in arrays)


def reach(text: str) -> Iterator[tuple[str, Instruction]]:
    """Every instruction that runs by itself, none inside of fusions and reductions, with its place."""
    entry, computations = parse(text)

    def walk(name: str, place: str) -> Iterator[tuple[str, Instruction]]:
        for instruction in computations[name]:
            if instruction.opcode in WITHOUT_TRAFFIC or instruction.opcode.endswith(("-done", "-update")):
                continue
            yield place, instruction
            if instruction.opcode in CALLERS:
                inside = {"conditional": BRANCH, "while": BRANCH if place == BRANCH else LOOP}
                for callee in instruction.calls:
                    yield from walk(callee, inside.get(instruction.opcode, place))

    return walk(entry, ONCE)


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry's name, and the instructions of every computation."""
    entry, computations, results, current = "", {}, {}, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            current, results = [], {}
            computations[header[2]] = current
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line):
            name, result, opcode, rest = found.groups()
            operands, _, attributes = rest.partition("), ")
            results[name] = arrays(result)
            taken = [array for operand in re.findall(r"%([\w.\-]+)", operands) for array in results.get(operand, [])]
            called = re.findall(rf"\b(?:{CALLS})=(\{{[^}}]*\}}|%[\w.\-]+)", attributes)
            names = [name for group in called for name in re.findall(r"%([\w.\-]+)", group)]
            current.append(Instruction(opcode, results[name], taken, names, '"ConcatBitcast"' in attributes))
    return entry, computations


def arrays(types: str) -> list[Array]:
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), int(space or 0))
        for dtype, shape, space in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d)\))?\})?", types)
    ]
