"""What is installed: the wheel's content, the entry point, no top-level `kernels` or `passes`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_holds_every_source(wheel):
    for folder in ("bicompile", "kernels", "passes"):
        for file in (ROOT / folder).rglob("*"):
            kinds = (".py", ".cpp", ".h", ".json", ".html", ".css", ".js")
            if file.suffix in kinds and "__pycache__" not in file.parts:
                inside = file.relative_to(ROOT)
                if folder != "bicompile":
                    inside = Path("bicompile") / inside
                elif {"kernels", "passes"} & set(file.relative_to(ROOT / folder).parts[:1]):
                    continue
                assert str(inside) in wheel
    assert "bicompile/py.typed" in wheel


def test_wheel_has_one_top_level_package(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"bicompile"}


def test_backend_is_an_entry_point():
    (entry,) = importlib.metadata.entry_points(
        group="torch_dynamo_backends", name="batch_invariant"
    )
    assert entry.value == "bicompile.backend:batch_invariant"


def test_the_name_works_without_an_import():
    code = (
        "import torch\n"
        "f = torch.compile(lambda x: x.softmax(-1), backend='batch_invariant')\n"
        "x = torch.randn(3, 7)\n"
        "assert torch.equal(f(x)[1:2], f(x[1:2]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_costs_nothing():
    code = "import sys, bicompile; assert 'torch' not in sys.modules; print(bicompile.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton(tmp_path):
    """PyTorch for CPUs alone comes without it."""
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no Triton here')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bicompile.cli, bicompile.explainer"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
