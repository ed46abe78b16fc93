"""`lit-dsunet plan`: a YAML with spacing, patch, network and batch size for a data set and a card."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from lit_cli.arguments import CommandParser
from lit_dsunet.headers import array_shape, read_geometry
from lit_dsunet.planner import Plan, fingerprint, make_plan, write_plan
from lit_dsunet.readers import Format, make_reader

__all__ = ["plan_main"]


def plan_main(args: Sequence[str]) -> Plan:
    """Plan from the headers of all images and write the YAML.

    Args:
        args: Command line after the word `plan`.

    Returns:
        The plan.

    Raises:
        InputError: the data set cannot be read, nothing fits, or the file exists.
    """
    parser = CommandParser(prog="lit-dsunet plan", description=__doc__)
    parser.add_argument("--root", required=True, help="data folder")
    parser.add_argument("--format", default="auto", choices=get_args(Format))
    parser.add_argument("--channels", nargs="+", help="images to read where the format has a choice")
    parser.add_argument("--memory_gb", type=float, required=True, help="memory of the card: 8, 12, 24, 40, 80, 140 ...")
    parser.add_argument("--arch", default="unet", choices=("unet", "resenc"))
    parser.add_argument("--out", type=Path, default=Path("plan.yaml"), help="file to write (%(default)s)")
    options = parser.parse_args(args)
    table = make_reader(options.format, options.root, options.channels).read()
    samples = [sample for split in table.splits.values() for sample in split]
    with ThreadPoolExecutor() as pool:
        geometries = list(pool.map(lambda sample: read_geometry(sample.images[0]), samples))
    data = fingerprint(
        [array_shape(g) for g in geometries],
        [g.spacing for g in geometries],
        len(table.channel_names),
        len(table.class_names),
    )
    plan = make_plan(data, options.memory_gb, arch=options.arch)
    write_plan(plan, options.out)
    print(plan.yaml(), end="")
    print(f"written to {options.out}; add it after a profile: --config gpu_8gb --config {options.out}")
    return plan
