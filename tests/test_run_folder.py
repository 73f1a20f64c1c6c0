"""A run's folder: whatever goes wrong while it is claimed, it stays a run's, and its configuration whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.errors import UserError
from pipelines import devices
from pipelines.run_folder import CONFIG_FILE, OutputFolder, check_output

OLD, NEW = "# diffalign train sft\nold: 1\n" * 20, "# diffalign train sft\nnew: 2\n" * 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name in ("checkpoints", "cache"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    for name in (CONFIG_FILE, "summary.json", "a first file"):
        (folder / name).write_text(OLD)
    return folder


def test_a_full_disk_leaves_the_configuration_that_was_there(run: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # no file may be longer
    try:
        with pytest.raises(UserError, match="config.yaml could not be written"):
            OutputFolder(run, NEW, resume=True, overwrite=False).claim()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (run / CONFIG_FILE).read_text() == OLD and not list(run.glob(".*"))


def test_overwriting_that_is_cut_off_leaves_a_run_that_can_be_overwritten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(run, NEW, resume=False, overwrite=True)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.claim()
    check_output(run, resume=False, overwrite=True)
    folder.claim()
    assert {path.name for path in run.iterdir()} == {CONFIG_FILE, "cache"} and (run / CONFIG_FILE).read_text() == NEW


def test_pytorch_without_cuda_is_told_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pip installs just that; elsewhere somebody chose it."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for system, told in (("win32", "on the CPU: this PyTorch was built without CUDA"), ("linux", "")):
        monkeypatch.setattr(devices.sys, "platform", system)
        assert devices.lacks_cuda().startswith(told) and bool(devices.lacks_cuda()) == bool(told)
