"""``gpurnn info``: what this installation is and what it can use, or what a run or a model file is."""

import importlib.metadata
import json
import os
import platform

import click

from . import options


@click.command("info")
@click.argument("run", required=False, metavar="[RUN|FILE]", type=click.Path(exists=True))
@options.max_memory
@options.as_json
def command(run, as_json):
    """Describe this installation and what it can use: versions, CPU, GPU.

    With the folder RUN: describe that run. Its task and data, the settings that differ from the defaults, the size of
    the model, how far it is trained, its best score, its files.

    With a FILE of gpurnn.save or of 'gpurnn export RUN FILE.safetensors': describe the model in it.
    """
    if run is None:
        _installation(as_json)
        return
    if os.path.isdir(run):
        from .run_facts import facts_of, rows_of
    else:
        from .file_facts import facts_of, rows_of

    facts = facts_of(run)
    if as_json:
        options.print_json(facts)
        return
    for name, value in rows_of(facts).items():
        options.say(options.row(name, value))


def _installation(as_json):
    import numpy as np

    from ..backends import backends, get_backend
    from ..backends.cpu.ops import describe
    from ..backends.cpu.threads import processors
    from ..backends.sources import kernel_files

    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    blas = {"name": build.get("name"), "version": build.get("version"), "threads": None}
    try:
        from threadpoolctl import threadpool_info

        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        if pools:
            blas["threads"] = pools[0]["num_threads"]
    except ImportError:
        pass
    available = backends()
    cpus = processors()
    document = {
        "gpurnn": options.VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "wheel": _wheel(),
        "library": _library(),
        "numpy": np.__version__,
        "blas": blas,
        "cpus": cpus,
        "backends": available,
        "cpu": describe(),
        "gpu": _gpu(get_backend("cuda").xp) if available["cuda"] is None else None,
        "kernels": kernel_files(),
    }
    if as_json:
        options.print_json(document)
        return
    threads = "" if blas["threads"] is None else f", {blas['threads']} threads"
    rows = {
        "gpurnn": options.VERSION,
        "Python": f"{document['python']} on {document['platform']}",
        "Wheel": document["wheel"] or "no wheel: a checkout",
        "Library": _compiled(document["library"]),
        "NumPy": f"{np.__version__} with {blas['name']} {blas['version']}{threads}; {cpus} CPUs",
        "GPU": ", ".join(f"{name} {value}" for name, value in (document["gpu"] or {"": "none in use"}).items()).strip(),
        "Kernels": f"{len(document['kernels'])} CUDA files: {', '.join(document['kernels'])}",
    }
    rows |= {f"'{name}'": "works" if reason is None else reason for name, reason in available.items()}
    rows["'cpu'"] = document["cpu"]
    rows["Runs"] = (
        "'numpy': array code, one timestep after another. 'cpu': compiled code. 'cupy': array code on the GPU. "
        "'cuda': one launch for a whole "
        "sequence where the weights fit on the chip, else a fused kernel and a cuBLAS product for each timestep, "
        "recorded as a CUDA graph; sums, masks, optimisers in kernels of their own. "
        "layer.plan(T, B) says what a call takes; 'gpurnn check' whether all of it is right here."
    )
    for name, value in rows.items():
        click.echo(options.row(name, value))


def _wheel():
    """The tags of the wheel that gpurnn was installed from, such as py3-none-win_amd64; None where it was no wheel."""
    try:
        distribution = importlib.metadata.distribution("gpurnn")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    if not lines or origin.get("dir_info", {}).get("editable"):
        return None
    tags = ", ".join(line.partition(":")[2].strip() for line in lines if line.startswith("Tag:"))
    return tags or None


def _library():
    """The compiled library: its file, the instruction set that it runs with and the best one here; None without it."""
    from ..backends.cpu.native import ISAS, library_path, load_native

    native = load_native()
    if native is None:
        return None
    library, level = native
    target = f"{platform.system()} {platform.machine()}"
    return {"file": library_path().name, "target": target, "isa": ISAS[level],
            "best_isa": ISAS[library.gpurnn_native_level()]}  # fmt: skip


def _compiled(library):
    """The row for ``_library``."""
    if library is None:
        return "none"
    forced = (
        "" if library["isa"] == library["best_isa"] else f", by GPURNN_ISA; this processor can {library['best_isa']}"
    )
    return f"{library['file']} for {library['target']}, with the instruction set {library['isa']}{forced}"


def _gpu(cupy):
    """Name, memory and versions of the current GPU."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    return {
        "name": properties["name"].decode(),
        "compute capability": f"{properties['major']}.{properties['minor']}",
        "GiB": round(properties["totalGlobalMem"] / 2**30, 1),
        "driver CUDA": f"{driver // 1000}.{driver % 1000 // 10}",
        "runtime CUDA": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "CuPy": cupy.__version__,
    }
