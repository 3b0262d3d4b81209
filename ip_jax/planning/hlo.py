"""What one run of a compiled program does on one device, read from its optimised HLO text: FLOPs,
memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as the loop turns.
Where a loop's end depends on the data the caller says how often it turns: once for decoding, so
that the result is that of one token. Of a conditional the dearest branch counts. A TPU splits an
asynchronous collective over several fusions, each with a copy of it: within fusions, what has the
same channel and dims counts once. Its reduce-scatter is a fusion of an all-reduce and a slice.

FLOPs are those of dot and convolution (into which TPUs turn dot), two for a multiply-add, and of
kernels (custom calls) by their own cost estimate or, splash attention, by formula (`splash`).
Traffic is what instructions outside of fusions read and write in the main memory: what lies in a
memory space of its own, S(n), is left out, and so is the part of an operand that a slice does not
touch.
"""

import dataclasses
import functools
import itertools
import math
import re

from ip_jax.planning.splash import splash_flops

ITEM_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# of XLA:TPU
BOOKKEEPING = {
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
}
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "domain",
}  # move nothing themselves

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_NAME = re.compile(r"%([\w.\-]+)")
# the metadata of a Pallas kernel is printed with line breaks of its own
_BROKEN_LINE = re.compile(r'\n(?="|\}\}|$)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` operations of one kind; `moved`: bytes that each device sends, a ring of the group's
    devices taken for granted.
    """

    count: int
    moved: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does. `opaque`: executed custom calls whose FLOPs are not known (a kernel
    without a cost estimate and without a formula); `open_loops`: executed loops whose number of
    turns the text does not tell.
    """

    flops: float = 0.0
    traffic: float = 0.0  # bytes read and written
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    opaque: int = 0
    open_loops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        both = {}
        for kind in {**self.collectives, **other.collectives}:
            a, b = (cost.collectives.get(kind, Collective(0, 0.0)) for cost in (self, other))
            both[kind] = Collective(a.count + b.count, a.moved + b.moved)
        return Cost(
            self.flops + other.flops,
            self.traffic + other.traffic,
            both,
            self.opaque + other.opaque,
            self.open_loops + other.open_loops,
        )

    def times(self, n: float) -> "Cost":
        """The cost of n runs; counts are rounded up."""
        repeated = {
            kind: Collective(math.ceil(n * c.count), n * c.moved)
            for kind, c in self.collectives.items()
        }
        return Cost(
            n * self.flops,
            n * self.traffic,
            repeated,
            math.ceil(n * self.opaque),
            math.ceil(n * self.open_loops),
        )

    @property
    def moved(self) -> float:
        """Bytes that each device sends in collectives of any kind."""
        return sum(collective.moved for collective in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an HLO type."""

    item_bits: int
    dims: tuple[int, ...]
    elsewhere: bool  # in a memory space of its own, not in the main memory

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Bytes in any memory."""
        return self.size * self.item_bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `rest`: attributes behind the operands."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    arguments: str  # the text between the parentheses
    rest: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result."""
        return tuple(
            Array(
                ITEM_BITS[kind],
                tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size),
                "S(" in (layout or ""),
            )
            for kind, dims, layout in _ARRAY.findall(self.type)
            if kind in ITEM_BITS
        )

    def attribute(self, name: str) -> str:
        """The value of `name={...}` or `name=word`, '' where there is none."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|[^\s,]+)", self.rest)
        return found.group(1).strip("{}") if found else ""

    def called(self, name: str) -> str:
        """The computation that an attribute names."""
        return self.attribute(name).lstrip("%")

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of integers."""
        return tuple(int(n) for n in self.attribute(name).split(",") if n)


Computation = dict[str, Instruction]  # by name, in order


def program_cost(text: str, open_turns: int = 1) -> Cost:
    """The cost of one run of the program whose optimised HLO is `text` (`compiled.as_text()`),
    loops that end by the data turning `open_turns` times.
    """
    computations, entry = parse(text)
    return _Counter(computations, open_turns).cost(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the entry's name). Raises ValueError for a text without an entry."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _BROKEN_LINE.sub(" ", text).splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start.group(2), {})
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(
            "the compiled program's text has no ENTRY computation: it is no optimised HLO"
        )
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    close = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : close]
    return Instruction(
        name,
        opcode.group(1),
        text[:end],
        tuple(_NAME.findall(arguments)),
        arguments,
        text[close + 1 :],
        is_root,
    )


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"an HLO line ends within parentheses: {text[:80]}")


class _Counter:
    """Costs of the computations of one program, each counted once."""

    def __init__(self, computations: dict[str, Computation], open_turns: int):
        self.computations = computations
        self.open_turns = open_turns
        self.cost = functools.cache(self._cost)

    def _cost(self, name: str) -> Cost:
        body, counted = self.computations[name], set()
        return sum(
            (self._of_instruction(instruction, body, counted) for instruction in body.values()),
            Cost(),
        )

    def _of_instruction(
        self, instruction: Instruction, body: Computation, counted: set, in_fusion: bool = False
    ) -> Cost:
        """`counted`: (kind, channel, dims) of the collectives in this computation's fusions that
        have been counted.
        """
        opcode = instruction.opcode
        if opcode == "while":
            once, turns = self.cost(instruction.called("body")), self._turns(instruction, body)
            return (
                once.times(self.open_turns) + Cost(open_loops=1)
                if turns is None
                else once.times(turns)
            )
        if opcode == "conditional":
            branches = _NAME.findall(instruction.rest.split("metadata=")[0])
            return max(
                (self.cost(branch) for branch in branches),
                key=lambda cost: (cost.flops, cost.traffic),
            )
        if opcode in ("call", "async-start"):
            return self.cost(_NAME.findall(instruction.rest)[0])
        inner = Cost()
        if opcode == "fusion":
            fused = self.computations[instruction.called("calls")]
            inner = sum(
                (
                    dataclasses.replace(self._of_instruction(i, fused, counted, True), traffic=0.0)
                    for i in fused.values()
                ),
                Cost(),
            )
        if opcode.removesuffix("-start") in COLLECTIVES:
            inner += _collective_cost(instruction, body, counted, in_fusion)
        flops, opaque = 0.0, 0
        if opcode == "dot":
            flops = _dot_flops(instruction, body)
        elif opcode == "convolution":
            flops = _convolution_flops(instruction, body)
        elif opcode == "custom-call":
            flops, opaque = _custom_call(instruction, body)
        return inner + Cost(flops=flops, traffic=self._traffic(instruction, body), opaque=opaque)

    def _turns(self, loop: Instruction, body: Computation) -> int | None:
        """How often a loop turns: as XLA notes it, else (TPU) from `counter < constant`, the
        counter's first value and its step.
        """
        if found := _TRIPS.search(loop.rest):
            return int(found.group(1))
        condition, turn = (
            self.computations[loop.called("condition")],
            self.computations[loop.called("body")],
        )
        test = next(i for i in condition.values() if i.is_root)
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, end = condition[test.operands[0]], _constant(test.operands[1], condition)
        if counter.opcode != "get-tuple-element" or end is None:
            return None
        index = int(counter.attribute("index"))
        start = (
            _constant(body[loop.operands[0]].operands[index], body)
            if body[loop.operands[0]].opcode == "tuple"
            else None
        )
        following = turn[next(i for i in turn.values() if i.is_root).operands[index]]
        steps = (
            [n for name in following.operands if (n := _constant(name, turn)) is not None]
            if following.opcode == "add"
            else []
        )
        return None if len(steps) != 1 or start is None else -(-(end - start) // steps[0])

    def _traffic(self, instruction: Instruction, body: Computation) -> float:
        opcode = instruction.opcode
        if (
            opcode in FREE
            or opcode.endswith(("-done", "-update"))
            or instruction.attribute("custom_call_target").strip('"') in BOOKKEEPING
        ):
            return 0.0
        written, operands = (
            instruction.arrays,
            [body[name] for name in instruction.operands if name in body],
        )
        if opcode == "dynamic-update-slice":
            return 2 * _bytes(operands[1].arrays)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _bytes(written)
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        if opcode == "slice-start":  # (the whole operand, the slice, ...)
            return written[1].nbytes + _bytes(written[1:])
        if opcode.endswith("-start"):  # the result lists the operand too
            return _bytes(written)
        return _bytes(written) + sum(_bytes(operand.arrays) for operand in operands)

    def _fusion_traffic(self, fusion: Instruction, operands: list[Instruction]) -> float:
        fused = self.computations[fusion.called("calls")]
        users: dict[str, list[Instruction]] = {}
        for instruction in fused.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        parameters = {int(i.arguments): i for i in fused.values() if i.opcode == "parameter"}
        read = sum(
            _read(parameters[i], users, operand)
            for i, operand in enumerate(operands)
            if i in parameters
        )
        root = next(i for i in fused.values() if i.is_root)
        results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        places = (
            [result.arrays for result in results] if root.opcode == "tuple" else [fusion.arrays]
        )
        return read + sum(
            _written(result, fused, arrays) for result, arrays in zip(results, places, strict=True)
        )


def _read(
    parameter: Instruction, users: dict[str, list[Instruction]], operand: Instruction
) -> float:
    """Bytes of an operand that a fusion reads."""
    if not _bytes(operand.arrays):
        return 0.0
    reached, slices = [parameter], 0.0
    while reached:
        source = reached.pop()
        for user in users.get(source.name, []):
            if user.opcode in ("bitcast", "copy"):
                reached.append(user)
            elif user.opcode == "tuple" or user.opcode in (*COLLECTIVES, "custom-call"):
                continue  # handed on, or sent: no read of this fusion
            elif (
                user.opcode in ("dynamic-slice", "slice", "gather")
                and user.operands[0] == source.name
            ):
                slices += sum(array.nbytes for array in user.arrays)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == source.name):
                return _bytes(operand.arrays)
    return min(slices, _bytes(operand.arrays))


def _written(result: Instruction, fused: Computation, arrays: tuple[Array, ...]) -> float:
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode in (*COLLECTIVES, "parameter", "custom-call"):
        return 0.0
    if result.opcode == "dynamic-update-slice" and _bytes(arrays):
        return sum(array.nbytes for array in fused[result.operands[1]].arrays)
    return _bytes(arrays)


def _constant(name: str, body: Computation) -> int | None:
    """The value of an integer constant, through copies of it."""
    while body[name].opcode in ("copy", "bitcast", "convert"):
        name = body[name].operands[0]
    return (
        int(body[name].arguments)
        if body[name].opcode == "constant" and body[name].arguments.lstrip("-").isdigit()
        else None
    )


def _bytes(arrays: tuple[Array, ...]) -> float:
    return sum(array.nbytes for array in arrays if not array.elsewhere)


def _dot_flops(dot: Instruction, body: Computation) -> float:
    lhs = body[dot.operands[0]].arrays[0]
    return (
        2.0
        * dot.arrays[0].size
        * math.prod(lhs.dims[d] for d in dot.numbers("lhs_contracting_dims"))
    )


def _convolution_flops(conv: Instruction, body: Computation) -> float:
    """Multiply-adds at positions that lie within the input, holes of dilations left out: how XLA
    counts, and what a dot in disguise needs.
    """
    lhs, rhs = (body[name].arrays[0] for name in conv.operands[:2])
    lhs_labels, kernel_labels, out_labels = re.fullmatch(
        r"(\w+)_(\w+)->(\w+)", conv.attribute("dim_labels")
    ).groups()
    out, window = conv.arrays[0], dict(re.findall(r"(\w+)=(\S+)", conv.attribute("window")))
    spatial = sum(label.isdigit() for label in lhs_labels)

    def in_window(name, default):
        return (
            [tuple(map(int, part.split("_"))) for part in window[name].split("x")]
            if name in window
            else [default] * spatial
        )

    size, stride, pad = in_window("size", (1,)), in_window("stride", (1,)), in_window("pad", (0, 0))
    lhs_dilate, rhs_dilate = in_window("lhs_dilate", (1,)), in_window("rhs_dilate", (1,))
    positions = 1
    for d in range(spatial):
        positions *= _valid_positions(
            lhs.dims[lhs_labels.index(str(d))],
            out.dims[out_labels.index(str(d))],
            size[d][0],
            stride[d][0],
            pad[d][0],
            lhs_dilate[d][0],
            rhs_dilate[d][0],
        )
    features = rhs.dims[kernel_labels.index("i")]
    return (
        2.0
        * positions
        * features
        * out.dims[out_labels.index("f")]
        * out.dims[out_labels.index("b")]
    )


@functools.cache
def _valid_positions(
    length: int, outputs: int, kernel: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """(output, kernel) pairs of one dimension that meet an element of the input rather than padding
    or a hole.
    """
    if kernel == 1 and pad == 0 and lhs_dilate == 1:
        return outputs
    reach = (length - 1) * lhs_dilate

    def meets(at):
        return 0 <= at <= reach and at % lhs_dilate == 0

    return sum(
        meets(o * stride + k * rhs_dilate - pad)
        for o, k in itertools.product(range(outputs), range(kernel))
    )


def _custom_call(call: Instruction, body: Computation) -> tuple[float, int]:
    """(FLOPs, 1 where the text does not tell them) of a custom call: a GPU's matrix product, a
    kernel with a cost estimate, splash attention.
    """
    target = call.attribute("custom_call_target").strip('"')
    if "gemm" in target or "matmul" in target:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.rest)
        dims = (
            [int(d.strip('"')) for d in contracted.group(1).split(",")]
            if contracted
            else [len(body[call.operands[0]].arrays[0].dims) - 1]
        )
        lhs = body[call.operands[0]].arrays[0]
        return 2.0 * call.arrays[0].size * math.prod(lhs.dims[d] for d in dims), 0
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', call.rest)
    if estimate:
        return float(estimate.group(1)), 0
    if target == "tpu_custom_call":
        shapes = [
            array.dims for name in call.operands if name in body for array in body[name].arrays[:1]
        ]
        flops = splash_flops(f"{call.name} {call.rest.split('backend_config=')[0]}", shapes)
        return flops or 0.0, int(flops is None and "ragged-dot-metadata" not in call.name)
    # triton_kernel_call, __cudnn$...; allocations and the like compute nothing
    return 0.0, int("call" in target or "cudnn" in target)


def _collective_cost(
    instruction: Instruction, body: Computation, counted: set, in_fusion: bool
) -> Cost:
    kind = instruction.opcode.removesuffix("-start")
    if in_fusion:
        root, copied = (
            next(i for i in body.values() if i.is_root),
            (kind, instruction.attribute("channel_id"), tuple(a.dims for a in instruction.arrays)),
        )
        if copied in counted:
            return Cost()
        counted.add(copied)
        if (
            kind == "all-reduce"
            and root.opcode == "dynamic-slice"
            and root.operands[0] == instruction.name
        ):
            kind = "reduce-scatter"
    return Cost(collectives={kind: Collective(1, _ring_bytes(kind, instruction, body))})


def _ring_bytes(kind: str, instruction: Instruction, body: Computation) -> float:
    operands = sum(
        array.nbytes for name in instruction.operands if name in body for array in body[name].arrays
    )
    if kind == "collective-permute":
        return operands
    n = _group_size(instruction.rest)
    whole = operands * n if kind == "all-gather" else operands
    return {"all-reduce": 2.0}.get(kind, 1.0) * whole * (n - 1) / n


def _group_size(rest: str) -> int:
    """Devices of one group: of mesh['a'=2,'b'=4] {'b'} (or a part of an axis, {'b':(1)2}), of
    [groups,size]<=[...], of {{0,1},{2,3}}.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        return math.prod(
            int(part) if part else sizes[axis]
            for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        )
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return int(iota.group(1).split(",")[-1])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if not groups:
        raise ValueError(
            f"the groups of a collective are written in a way that is not known here: {rest[:200]}"
        )
    return len(groups.group(1).split(","))
