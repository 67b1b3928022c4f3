"""What machines can do, as numbers that each say where they come from.

A paper plan rests on these constants alone. "measured" was measured with trimtab on such a machine, "published" is its
maker's figure, and "assumed" is neither. `trimtab check` writes those of the machine it runs on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from trimtab.core.errors import ConfigError
from trimtab.core.files import read_json, write_whole

Origin = Literal["measured", "published", "assumed"]


@dataclass(frozen=True)
class Constant:
    """A number of a machine, for example `Constant(79.0, "GiB", "published", "80 GB of HBM3")`."""

    value: float
    unit: str
    origin: Origin
    source: str
    """Which command on which machine and when, whose figure, or why it was assumed."""


@dataclass(frozen=True)
class Machine:
    """A kind of processor and how many of them are tied together."""

    name: str
    kind: Literal["gpu", "cpu"]
    constants: Mapping[str, Constant]
    """By the names in `UNITS`."""

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value

    def is_device(self, device: str) -> bool:
        """Whether a setting such as engine.sampler.device names this processor: the CPU, or the first GPU."""
        return device in (("cpu",) if self.kind == "cpu" else ("cuda", "cuda:0"))

    def share(self, processes: int) -> Machine:
        """The machine as each of so many processes has it while all compute: a GPU of its own, or an equal part of the
        rates of a CPU."""
        if self.kind == "gpu":
            return self
        parts = {name: replace(c, value=c.value / processes) for name, c in self.constants.items() if name in _SHARED}
        return replace(self, constants={**self.constants, **parts})


UNITS = {
    "memory": "GiB",
    "context": "GiB",
    "slack": "of the tensors",
    "processors": "",
    "float32_products": "FLOP/s",
    "bfloat16_products": "FLOP/s",
    "float32_share": "of products",
    "bfloat16_share": "of products",
    "head_products": "FLOP/s",
    "attention_forward": "FLOP/s",
    "attention_backward": "FLOP/s",
    "optimizer": "B/s",
    "bandwidth": "B/s",
    "decoding_block": "s",
    "link": "B/s",
    "node_link": "B/s",
    "per_node": "",
    "host_link": "B/s",
}
"""The constants of a machine: memory for everything, what a process takes without tensors, and what the allocator
reserves beyond them; multiprocessors; rates of large products, the share of them that the blocks of a model reach in
training with all that lies between the products, and the rate of the output head; attention; bytes that the optimizer
moves; memory bandwidth; seconds to start the operations of one block in a decoding step; a link between two of these
processors in a node and between nodes, and how many stand in a node; the link to the memory of the host."""
_RATES = ("float32_products", "bfloat16_products", "head_products", "attention_forward", "attention_backward")
_SHARED = (*_RATES, "optimizer", "bandwidth", "host_link")
"""What the processes of a CPU divide among them. A block of a decoding step is started by each for itself."""

_GPU = "benchmarks/gpu.py on one H200, torch 2.11.0+cu130, commit 665cac8"
_PAGE = f"docs/evidence/engines.md section 7: {_GPU}"
_H200 = {
    "memory": Constant(139.0, "GiB", "published", "141 GB of HBM3e, as torch counts them"),
    "context": Constant(0.6, "GiB", "assumed", "CUDA context and libraries; not measured"),
    "slack": Constant(
        0.1, UNITS["slack"], "assumed", "reserved beyond allocated was 0.08 (PPO) to 0.25 (SFT), gpu.json"
    ),
    "processors": Constant(132, "", "published", "multiprocessors of an H100 and an H200 (SXM)"),
    "float32_products": Constant(50e12, "FLOP/s", "measured", _PAGE),
    "bfloat16_products": Constant(720e12, "FLOP/s", "measured", _PAGE),
    "float32_share": Constant(0.8, UNITS["float32_share"], "assumed", "training in float32 was not timed on a GPU"),
    "bfloat16_share": Constant(
        0.375,
        UNITS["bfloat16_share"],
        "measured",
        f"{_GPU}: what is left of `rl`, replies alone, 1,024 wide (gpu.json)",
    ),
    "head_products": Constant(382e12, "FLOP/s", "measured", f"{_PAGE} (TF32)"),
    "attention_forward": Constant(323e12, "FLOP/s", "measured", f"{_PAGE}: 1.7 ms for two rows of 8,192"),
    "attention_backward": Constant(218e12, "FLOP/s", "measured", f"{_PAGE}: 6.3 ms for two rows of 8,192"),
    "optimizer": Constant(3.2e12, "B/s", "measured", f"{_PAGE}: 5.2 ms for 0.6 billion weights of 28 bytes"),
    "bandwidth": Constant(4.8e12, "B/s", "published", "HBM3e of an H200"),
    "decoding_block": Constant(1.3e-3, "s", "measured", f"{_GPU}: `sampling`, 28 blocks; an operation starts in 13 us"),
    "link": Constant(360e9, "B/s", "assumed", "0.8 of 450 GB/s each way by NVLink 4 (published)"),
    "node_link": Constant(40e9, "B/s", "assumed", "0.8 of 50 GB/s for each GPU between nodes (published: 400 Gb/s)"),
    "per_node": Constant(8, "", "published", "HGX"),
    "host_link": Constant(50e9, "B/s", "assumed", "0.8 of PCIe 5 x16 (published: 63 GB/s)"),
}


def _like(other: Mapping[str, Constant], arithmetic: float, why: str, **own: Constant) -> dict[str, Constant]:
    """Constants of a GPU that was not measured, whose arithmetic is this share of another's."""
    return {
        name: Constant(c.value * (arithmetic if name in _RATES else 1.0), c.unit, "assumed", why)
        if c.origin == "measured"
        else c
        for name, c in other.items()
    } | own


_H100 = _like(
    _H200,
    1.0,
    "as measured on an H200, whose arithmetic is that of an H100",
    memory=Constant(79.0, "GiB", "published", "80 GB of HBM3, as torch counts them"),
    bandwidth=Constant(3.35e12, "B/s", "published", "HBM3 of an H100 (SXM)"),
    optimizer=Constant(2.2e12, "B/s", "assumed", "0.67 of the bandwidth, as measured on an H200"),
)
_A100 = _like(
    _H200,
    312 / 989,
    "the H200's figure times 312 / 989, the ratio of the published bfloat16 peaks",
    memory=Constant(79.0, "GiB", "published", "80 GB of HBM2e, as torch counts them"),
    processors=Constant(108, "", "published", "multiprocessors of an A100"),
    bandwidth=Constant(2.0e12, "B/s", "published", "HBM2e of an A100 80 GB (SXM)"),
    optimizer=Constant(1.3e12, "B/s", "assumed", "0.67 of the bandwidth, as measured on an H200"),
    link=Constant(240e9, "B/s", "assumed", "0.8 of 300 GB/s each way by NVLink 3 (published)"),
    node_link=Constant(20e9, "B/s", "assumed", "0.8 of 25 GB/s for each GPU between nodes (published: 200 Gb/s)"),
    host_link=Constant(25e9, "B/s", "assumed", "0.8 of PCIe 4 x16 (published: 31 GB/s)"),
)
MACHINES = {name: Machine(name, "gpu", c) for name, c in (("h100", _H100), ("h200", _H200), ("a100", _A100))}

FILE = "machine.json"
_ON_A_CPU = {
    "slack": Constant(0.05, UNITS["slack"], "assumed", "memory that the allocator keeps"),
    "processors": Constant(1, "", "assumed", "not used on a CPU"),
    "float32_share": Constant(0.75, UNITS["float32_share"], "assumed", "docs/evidence/speed.md, of the product rate"),
    "bfloat16_share": Constant(0.5, UNITS["bfloat16_share"], "assumed", "not timed"),
    "decoding_block": Constant(2e-4, "s", "assumed", "Python between the kernels of a block"),
    "link": Constant(1e9, "B/s", "assumed", "gloo between processes of one machine"),
    "node_link": Constant(1e9, "B/s", "assumed", "gloo between processes of one machine"),
    "per_node": Constant(1 << 30, "", "assumed", "processes of one machine"),
    "host_link": Constant(1e10, "B/s", "assumed", "a copy in memory"),
}


def machine_of(name: str, kind: Literal["gpu", "cpu"], found: Mapping[str, float], source: str) -> Machine:
    """A machine with these measured constants. Those that were not measured are assumed: a GPU's to be the H200's,
    with rates in the ratio of the products in bfloat16."""
    measured = {key: Constant(value, UNITS[key], "measured", source) for key, value in found.items()}
    if kind == "gpu":
        share = found["bfloat16_products"] / _H200["bfloat16_products"].value
        rest = _like(_H200, share, f"the H200's figure times {share:.2g}, the ratio of products in bfloat16")
        return Machine(name, kind, rest | measured)
    rates = ("head_products", "attention_forward", "attention_backward")
    half = "half of the products in float32"
    like = {key: Constant(found["float32_products"] / 2, "FLOP/s", "assumed", half) for key in rates}
    moved = {"optimizer": Constant(found["bandwidth"] / 2, "B/s", "assumed", "half of the bandwidth")}
    return Machine(name, kind, _ON_A_CPU | like | moved | measured)


def write_machine(machine: Machine, file: Path) -> None:
    """Writes the constants as JSON, for `find_machine`."""
    values = {
        "name": machine.name,
        "kind": machine.kind,
        "constants": {k: asdict(c) for k, c in machine.constants.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(values, indent=1) + "\n")


def find_machine(name: str) -> Machine:
    """A machine of the table, or that of a file that `trimtab check` wrote. Raises ConfigError for anything else, and
    DataError for a file without a JSON object."""
    if name in MACHINES:
        return MACHINES[name]
    fix = f"name one of {', '.join(MACHINES)}, or the {FILE} that trimtab check writes"
    again = "write it again with trimtab check"
    if not Path(name).is_file():
        raise ConfigError(f"no machine {name!r} is known, and no such file", where="--on", fix=fix)
    values = read_json(Path(name), fix=again)
    try:
        constants = {key: Constant(**value) for key, value in values["constants"].items() if key in UNITS}
        made = Machine(str(values["name"]), values["kind"], constants)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"this is no description of a machine: {error!r}", where=f"--on {name}", fix=fix) from error
    wrong = [key for key in UNITS if key not in constants or not _is_right(key, constants[key])]
    if made.kind not in ("gpu", "cpu") or wrong:
        problem = f"constants are missing or wrong: {', '.join(wrong) or 'kind'}"
        raise ConfigError(problem, where=f"--on {name}", fix=again)
    return made


def _is_right(key: str, constant: Constant) -> bool:
    """Whether the value of a constant is a number that it can have: not below 0, and above 0 if it is divided by."""
    value: Any = constant.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    least = 0 if UNITS[key] in ("GiB", "of the tensors", "s", "") else math.ulp(0.0)
    return value >= least and constant.origin in get_args(Origin) and isinstance(constant.source, str)
