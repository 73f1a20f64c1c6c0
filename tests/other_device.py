"""A process in which PyTorch has an accelerator, on a machine without one: ``other_device.cpp``, built and registered as "other".

    python tests/other_device.py FOLDER JOBS [mps]

builds into FOLDER (30 s, once) and does one thing after the other there. JOBS is a JSON list; a job is the words of a command of
``diffalign``, {"family": ..., "objective": ..., "folder": ...} for a short run of a miniature, or {"remove": ...} for a folder.
The first failure ends it. With ``mps`` the device refuses what MPS cannot do, and diffalign is told so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

from diffalign.types import WAITED_FOR, WITHOUT_FLOAT64

NAME = "other"


def start(folder: Path, like_mps: bool = False) -> None:
    """From here on there is a device ``other``, which Accelerate and all of ours take for the one to use."""
    source = Path(__file__).with_suffix(".cpp")
    built = cpp_extension.load("other_device", [str(source)], extra_cflags=["-O0", "-w"], build_directory=str(folder))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    built.register_hooks()
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    if like_mps:
        built.be_like_mps()
        WITHOUT_FLOAT64.add(NAME)
        WAITED_FOR.add(NAME)


def _module() -> types.ModuleType:
    """What PyTorch expects at ``torch.other``. There are no random numbers of the device's own: ours are drawn on the CPU."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = (lambda: 1), (lambda: 0)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False
    module.get_rng_state, module.set_rng_state = (lambda *_: torch.get_rng_state()), (lambda *_: None)
    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "_lazy_init"):
        setattr(module, name, lambda *_: None)
    return module


def do(job: list[str] | dict[str, str]) -> None:
    if isinstance(job, list):
        from pipelines import cli

        if status := cli.main([job[0], "--debug", *job[1:]]):
            sys.exit(status)
        return
    if "remove" in job:
        shutil.rmtree(job["remove"])
        return
    from family_runs import on_disk, run

    folder, name = Path(job["folder"]), job["family"]
    output = folder / f"{name}-{job['objective']}".replace(" ", "-")
    run(on_disk(name, folder), folder / "pairs" / "pairs.jsonl", job["objective"], output, steps=1)


if __name__ == "__main__":
    start(Path(sys.argv[1]), sys.argv[3:] == ["mps"])
    for job in json.loads(sys.argv[2]):
        print("job:", job, flush=True)
        do(job)
