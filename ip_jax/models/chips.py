"""What the makers publish about accelerators.

TPUs: the specification tables of docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e. GPUs: the data
sheets of A100, H100 and H200 (SXM) on nvidia.com, dense bfloat16. Links: what a chip sends in one
direction over all of its links, half of the published bidirectional figure.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: memory in bytes, peak in bfloat16 FLOP/s, memory bandwidth and links in
    bytes/s.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    links: float


GIB, T, G = 2**30, 1e12, 1e9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * GIB, 197 * T, 819 * G, 200 * G),
        Chip("v5p", 95 * GIB, 459 * T, 2765 * G, 600 * G),
        Chip("v6e", 32 * GIB, 918 * T, 1638 * G, 400 * G),
        Chip("a100", 80 * G, 312 * T, 2039 * G, 300 * G),
        Chip("h100", 80 * G, 989 * T, 3350 * G, 450 * G),
        Chip("h200", 141 * G, 989 * T, 4800 * G, 450 * G),
    )
}
# jax.Device.device_kind -> chip, in full: an H100 PCIe, a part of a GPU (MIG) or a GH200 is another
# chip
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind` (one that is only planned for has its own name), None
    where nothing is published here.
    """
    return CHIPS.get(KINDS.get(device_kind, device_kind))
