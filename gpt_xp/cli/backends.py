"""`gpt-xp backends`: list the array libraries, their devices, and how to install those that are missing."""

import dataclasses
from collections.abc import Sequence

import click

from gpt_xp.backend import BackendInfo, DeviceInfo
from gpt_xp.cli.options import CONTEXT, flag, json_option, note_no_effect, option
from gpt_xp.cli.output import waiting, write, write_json
from gpt_xp.cli.wording import Command
from gpt_xp.hardware import BackendReport, MeshFit, ModelFit, mesh_fits, report_on_backends
from gpt_xp.mesh import MeshShape, parse_mesh
from gpt_xp.registry import backends as find_backends
from gpt_xp.registry import default_backend
from gpt_xp.reporting.text import table, wrapped


@click.command(cls=Command, context_settings=CONTEXT)
@flag("--verbose", help="Also show settings, which models fit, and the fastest decode that memory allows.")
@option(
    "--mesh", metavar="MESH", help="With --verbose: show what each device of this mesh holds, such as data=2,model=4."
)
@json_option
@click.pass_context
def backends(ctx: click.Context, verbose: bool, mesh: str | None, as_json: bool) -> None:
    """List the array libraries, their devices, and how to install those that are missing."""
    shape = parse_mesh(mesh) if verbose and mesh is not None else None
    if not verbose:
        note_no_effect(ctx, ["mesh"], "without --verbose")
    with waiting("looking for devices"):
        found = sorted(find_backends(), key=lambda info: info.name)
    with waiting("measuring"):
        reports = report_on_backends(found) if verbose else []
    default = default_backend()
    devices = next((info.devices for info in found if info.name == "jax"), ())
    if shape is not None and shape.data is None:
        shape = shape.fitted_to(max(len(devices), 1))
    fits = mesh_fits(shape, _dtypes_of_jax(reports), _memory_of_each(devices, shape)) if shape else []
    if as_json:
        record = {"default": default, "backends": [dataclasses.asdict(info) for info in found]}
        more = {"diagnoses": list(map(dataclasses.asdict, reports))} if verbose else {}
        write_json(record | more | ({"mesh": list(map(dataclasses.asdict, fits))} if shape else {}))
        return
    header = ("", "backend", "installed", "devices")
    write(table([header, *(row for info in found for row in _rows(info, default))]))
    write("* the default; choose another with --backend or GPT_XP_BACKEND\n")
    write("On a CPU, native is the fastest. Others are compared with numpy.\n")
    write("".join(map(_report, reports)))
    if reports:
        write(f"\n{EXPLANATION}")
    if shape:
        here = f"it needs {shape.n_devices} devices, and jax has {len(devices)} here"
        write(f"\nGB of params + cache of one row on each device of the mesh {shape} ({here}), and whether they fit:\n")
        write(_mesh_table(fits))


FITS = {True: "yes", False: "no", None: "?"}
EXPLANATION = """\
Under each dtype: the GB of the params and of the cache of one row at full
context; whether they fit the device; and the most tokens per second in one row
at that bandwidth, because each token reads all params once.
"""


def _dtypes_of_jax(reports: Sequence[BackendReport]) -> list[str]:
    found = [each.dtype for report in reports if report.backend == "jax" for each in report.models]
    return list(dict.fromkeys(found)) or ["float32"]


def _memory_of_each(devices: Sequence[DeviceInfo], shape: MeshShape) -> int | None:
    """Return the memory of a device of a mesh; the devices that JAX makes out of one CPU share its memory."""
    memory = devices[0].memory if devices else None
    return memory // shape.n_devices if memory is not None and devices[0].name.startswith("cpu") else memory


def _mesh_table(fits: Sequence[MeshFit]) -> str:
    columns: dict[str, list[str]] = {}
    for each in fits:
        cell = f"{each.params / 1e9:5.2f} + {each.cache / 1e9:.3f} {FITS[each.fits]}"
        columns.setdefault(each.dtype, [each.dtype]).append(cell)
    names = ["  model", *(f"  {name}" for name in dict.fromkeys(each.model for each in fits))]
    return table(list(zip(names, *columns.values(), strict=True)))


def _rows(info: BackendInfo, default: str) -> list[tuple[str, ...]]:
    """Return a row for each device; the first has the name of the backend."""
    lines = list(map(_device, info.devices))
    if info.problem:
        lines += [info.problem, *([info.fix] if info.fix else [])]
    mark = "*" if info.name == default else ""
    first = (mark, info.name, info.version or "no")
    return [(*(first if place == 0 else ("", "", "")), line) for place, line in enumerate(lines or [""])]


def _device(device: DeviceInfo) -> str:
    memory = "" if device.memory is None else f", {device.memory / 1e9:.1f} GB"
    return f"{device.name} ({device.kind}{memory})"


def _report(found: BackendReport) -> str:
    if found.problem is not None:
        return "\n" + wrapped(f"{found.backend}: {found.problem}")
    assert found.device
    assert found.settings is not None
    assert found.bandwidth is not None
    reads = f"{found.backend} on {found.device.name} reads {found.bandwidth / 1e9:.1f} GB/s"
    settings = ", ".join(f"{name} {value}" for name, value in found.settings.items())
    columns: dict[str, list[str]] = {}
    for each in found.models:
        columns.setdefault(each.dtype, [each.dtype]).append(_fit(each))
    names = ["  model", *(f"  {name}" for name in dict.fromkeys(each.model for each in found.models))]
    return "\n" + wrapped(f"{reads}; {settings}") + table(list(zip(names, *columns.values(), strict=True)))


def _fit(each: ModelFit) -> str:
    limit = f"{each.decode_limit:.1f}" if each.decode_limit < 10 else f"{each.decode_limit:.0f}"
    return f"{each.needed / 1e9:4.1f} {FITS[each.fits]:3} {limit:>5}"
