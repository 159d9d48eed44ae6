"""python -m neva_jax.plan: memory, transfers and step time of a configuration, before anything runs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from neva_jax.checks import check_numbers
from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import parse_mesh_shape
from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.parallel.target import TARGETS
from neva_jax.planning import report
from neva_jax.planning.collectives import Collective, collectives
from neva_jax.planning.compiled import compile_step
from neva_jax.planning.knobs import knobs
from neva_jax.planning.memory import GIB, estimate
from neva_jax.planning.speed import RATES, Machine, default_rate, predict
from neva_jax.training.setup import with_vocabulary

MOST_DEVICES = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and prints the plan; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    shape = [f"mesh.shape={options.mesh_shape}"] if options.mesh_shape is not None else []
    config = load_config(options.config, [*options.overrides, *shape])
    check_numbers(config)
    config = _with_vocabulary(config)
    for name in ("memory_gib", "tflops", "nvlink_gbs", "network_gbs", "per_node", "devices", "sweep"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    kinds = options.compile or None, options.compile_for, options.layers, options.sweep
    if sum(kind is not None for kind in kinds) > 1:
        raise UserError("--compile, --compile-for, --layers and --sweep are plans of different kinds; give one of them")
    gib = options.memory_gib
    if gib is None:
        gib = TARGETS[options.compile_for][2] / GIB if options.compile_for in TARGETS else 141.0
    machine = Machine(
        flops=(options.tflops or default_rate(config)) * 1e12,
        nvlink=options.nvlink_gbs * 1e9,
        network=options.network_gbs * 1e9,
        per_node=options.per_node,
    )
    if options.sweep is not None:
        print(_sweep(config, options.sweep, machine, gib, options.json))
        return 0
    sizes = parse_mesh_shape(config.mesh.shape, options.devices or _fewest_devices(config.mesh.shape))
    if options.layers is not None:
        print(_layers(config, sizes, options.layers, machine, gib, options.json))
        return 0
    compiling = options.compile or options.compile_for is not None
    print(_plan(config, sizes, machine, gib, compiling, options.compile_for, options.json))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m neva_jax.plan",
        description="Memory per device, transfers and step time of a configuration, from shapes alone.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; docs/configuration.md lists every key")
    parser.add_argument("--mesh-shape", metavar="SHAPE", help="sizes of the mesh axes, as data=2,tensor=4")
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices that an axis of -1 shares; they need not exist"
    )
    parser.add_argument(
        "--memory-gib", type=float, metavar="G", help="memory of a device (that of --compile-for; else an H200's 141)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the step for the devices here, to compare")
    parser.add_argument(
        "--compile-for", metavar="GPU", help=f"the same for a GPU that need not be here: {', '.join(TARGETS)}"
    )
    parser.add_argument("--layers", metavar="L,L,…", help="memory against the language model's number of layers")
    parser.add_argument("--sweep", type=int, metavar="N", help=f"every mesh of N devices, N up to {MOST_DEVICES}")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
    parser.add_argument("--tflops", type=float, metavar="X", help=f"TFLOP/s of matrix products (H200: {rates})")
    parser.add_argument("--nvlink-gbs", type=float, default=450, metavar="X", help="GB/s each way inside a node (450)")
    parser.add_argument("--network-gbs", type=float, default=50, metavar="X", help="GB/s per GPU between nodes (50)")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs in a node (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes, seconds, operations")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the file")
    return parser


def _with_vocabulary(config: Config) -> Config:
    if config.model.llm.vocab_size is not None:
        return config
    path = config.model.tokenizer
    if path is None or not Path(path).is_file():
        raise UserError(
            f"model.llm.vocab_size is not set, and model.tokenizer={path} is no file to take it from; set it"
        )
    return with_vocabulary(config, Tokenizer.from_file(path))


def _fewest_devices(shape: str) -> int:
    """The devices that a mesh shape names, -1 counting as one."""
    numbers = [part.partition("=")[2] for part in shape.split(",")]
    return math.prod(int(number) for number in numbers if number.strip().isdecimal() and int(number))


def _plan(
    config: Config,
    sizes: dict[str, int],
    machine: Machine,
    gib: float,
    compiling: bool,
    target: str | None,
    as_json: bool,
) -> str:
    plan = estimate(config, sizes)
    speed, helps = predict(plan, machine), knobs(plan, machine)
    compiled = beside = None
    sent: list[Collective] = []
    if compiling:
        compiled, step = compile_step(config, sizes, target)
        beside = estimate(config, sizes, "cpu" if compiled.platform == "cpu" else "gpu").memory
        sent = collectives(step.as_text(), jax.tree.leaves(step.input_shardings)[0].mesh)
    if as_json:
        values = report.plan_dict(plan, gib, speed)
        values["knobs"] = [dataclasses.asdict(knob) for knob in helps]
        if compiled is not None and beside is not None:
            values["compiled"] = {**dataclasses.asdict(compiled), "total": compiled.total, "estimate": beside.total}
            values["compiled"]["collectives"] = report.collectives_dict(sent)
        return json.dumps(values)
    return "\n".join(
        [
            *report.heading(plan),
            "",
            *report.memory_table(plan.memory, compiled, beside),
            "",
            *report.verdict(plan, gib, helps),
            "",
            *report.knob_table(helps),
            "",
            *report.speed_lines(speed),
            *report.collectives_table(sent, machine),
        ]
    )


def _sweep(config: Config, devices: int, machine: Machine, gib: float, as_json: bool) -> str:
    if devices > MOST_DEVICES:
        raise UserError(f"--sweep {devices}: at most {MOST_DEVICES} devices")
    layouts = report.sweep(config, devices, machine)
    if as_json:
        rows = [
            report.plan_dict(layout.plan, gib, layout.speed)
            if layout.plan is not None and layout.speed is not None
            else {"mesh": layout.sizes, "reason": layout.reason}
            for layout in layouts
        ]
        return json.dumps({"devices": devices, "meshes": rows})
    return "\n".join(report.sweep_table(layouts, gib))


def _layers(config: Config, sizes: dict[str, int], text: str, machine: Machine, gib: float, as_json: bool) -> str:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text}: must be whole numbers, as 8,16,32") from None
    plans = []
    for count in counts:
        llm = dataclasses.replace(config.model.llm, num_layers=count)
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))
        check_numbers(changed)
        plans.append(estimate(changed, sizes))
    if as_json:
        return json.dumps([report.plan_dict(plan, gib, predict(plan, machine)) for plan in plans])
    return "\n".join([*report.heading(plans[0]), "", *report.layers_table(plans, gib)])


if __name__ == "__main__":
    exit_with(main)
