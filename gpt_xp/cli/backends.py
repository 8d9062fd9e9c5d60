"""`gpt-xp backends`: which array libraries are here, and how to get the others."""

import dataclasses

import click

from gpt_xp.backend import BackendInfo, DeviceInfo, default_backend
from gpt_xp.backend import backends as find_backends
from gpt_xp.cli.options import CONTEXT, json_option
from gpt_xp.cli.output import table, waiting, write, write_json


@click.command(context_settings=CONTEXT)
@json_option
def backends(as_json: bool) -> None:
    """Show the array libraries to compute with, their devices, and what is missing."""
    with waiting("looking for devices"):
        found = sorted(find_backends(), key=lambda info: info.name)
    default = default_backend()
    if as_json:
        write_json({"default": default, "backends": [dataclasses.asdict(info) for info in found]})
        return
    header = ("", "backend", "installed", "devices")
    write(table([header, *(row for info in found for row in _rows(info, default))]))
    write("* the default; choose another with --backend or GPT_XP_BACKEND\n")


def _rows(info: BackendInfo, default: str) -> list[tuple[str, ...]]:
    """Return a line for each device; the first says which backend it is."""
    lines = list(map(_device, info.devices))
    if info.problem:
        lines += [info.problem, *([info.fix] if info.fix else [])]
    mark = "*" if info.name == default else ""
    first = (mark, info.name, info.version or "no")
    return [(*(first if place == 0 else ("", "", "")), line) for place, line in enumerate(lines or [""])]


def _device(device: DeviceInfo) -> str:
    memory = "" if device.memory is None else f", {device.memory / 1e9:.1f} GB"
    return f"{device.name} ({device.kind}{memory})"
