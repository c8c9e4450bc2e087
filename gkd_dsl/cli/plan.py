"""`gkd plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gkd_dsl.cli.options import USAGE, Json, Online, Sets, Spec, checked, fail, require_ok

if TYPE_CHECKING:
    from gkd_dsl.planning.machine import Machine


def _option(name: str, metavar: str, text: str) -> object:
    return typer.Option(name, metavar=metavar, help=text)


Devices = Annotated[
    int | None, typer.Option("--devices", metavar="N", help="how many GPUs; else this machine's", min=1)
]
DeviceMemory = Annotated[str | None, _option("--device-memory", "SIZE", "memory of each, such as `40GiB`")]
HostMemory = Annotated[str | None, _option("--host-memory", "SIZE", "memory of the host, such as `512GiB`")]
Link = Annotated[str | None, _option("--link", "RATE", "between the host and each device; else `25GB/s`")]
Between = Annotated[str | None, _option("--between", "RATE", "from a device to the others; else that of `--link`")]
Disk = Annotated[str | None, _option("--disk", "RATE", "from the disk; else `5GB/s`")]
Compute = Annotated[
    str | None, _option("--compute", "RATE", "arithmetic of a device; else `300TFLOP/s`, of a CPU `0.1TFLOP/s`")
]


def plan(
    spec: Spec,
    set_: Sets = None,
    devices: Devices = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    link: Link = None,
    between: Between = None,
    disk: Disk = None,
    compute: Compute = None,
    json: Json = False,
    online: Online = False,
) -> None:
    """Say what a spec needs of a machine: memory, traffic, the least time of a step, and a change that makes it fit.

    From configs alone: no weights are loaded.
    """
    machine = _machine(devices, device_memory, host_memory)
    machine = _speeds(machine, link, between, disk, compute)
    result = checked(spec, set_, online=online)
    require_ok(result)
    if not result.stages:
        fail(f"{spec} holds methods only, and a plan is of a spec's stages")
    from gkd_dsl.graph.passes import compile_plan
    from gkd_dsl.planning.report import report

    found = report(spec, compile_plan(result.graph, runtime=result.runtime), machine)
    if json:
        import json as json_

        typer.echo(json_.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    typer.echo(found.text())


def _machine(devices: int | None, device_memory: str | None, host_memory: str | None) -> Machine:
    """The machine of the options; what is not said is as it is here."""
    from dataclasses import replace

    from gkd_dsl.planning import units
    from gkd_dsl.planning.machine import COMPUTE, this_machine

    here = this_machine()
    if devices is not None or device_memory is not None:
        if device_memory is None and here.kind == "cpu":
            fail("--devices counts GPUs, and there is none here to know the size of: add --device-memory 40GiB", USAGE)
        memory = here.device_memory
        if device_memory is not None:
            memory = int(_read("--device-memory", device_memory, units.memory))
        here = replace(here, devices=devices or 1, device_memory=memory, kind="cuda", compute=COMPUTE["cuda"])
    if host_memory is not None:
        host = int(_read("--host-memory", host_memory, units.memory))
        here = replace(here, host_memory=host, device_memory=host if here.kind == "cpu" else here.device_memory)
    return here


def _speeds(machine: Machine, link: str | None, between: str | None, disk: str | None, compute: str | None) -> Machine:
    """The machine with the rates of the options."""
    from dataclasses import replace

    from gkd_dsl.planning import units

    if link is not None:
        rate = _read("--link", link, units.rate)
        machine = replace(machine, link=rate, between=rate)
    if between is not None:
        machine = replace(machine, between=_read("--between", between, units.rate))
    if disk is not None:
        machine = replace(machine, disk=_read("--disk", disk, units.rate))
    if compute is not None:
        machine = replace(machine, compute=_read("--compute", compute, units.speed))
    return machine


def _read(option: str, text: str, read: Callable[[str], float]) -> float:
    from gkd_dsl.planning.units import UnitError

    try:
        return read(text)
    except UnitError as error:
        fail(f"{option}: {error}", USAGE)
