import ast
import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffusers_moviegen


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package built as a wheel without network from a copy, so that the checkout gets no build folders."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "diffusers_moviegen", source / "diffusers_moviegen", ignore=shutil.ignore_patterns("__pycache__")
    )
    # A leftover of a Python run must not travel with the package.
    (source / "diffusers_moviegen/checkpoints/__pycache__").mkdir()
    (source / "diffusers_moviegen/checkpoints/__pycache__/stale.cpython-311.pyc").write_bytes(b"stale")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "."]
    result = subprocess.run(
        [*command, "--wheel-dir", str(folder)], cwd=source, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def archive(wheel):
    with zipfile.ZipFile(wheel) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(archive):
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


def test_wheel_holds_every_file_of_the_package(archive):
    package = ROOT / "diffusers_moviegen"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in archive.namelist() if name.startswith("diffusers_moviegen/")}
    assert held == expected
    assert any(name.startswith("diffusers_moviegen/configs/") and name.endswith("config.json") for name in held)
    assert "diffusers_moviegen/checkpoints/toybox/model_index.json" in held


def test_wheel_metadata(archive, metadata):
    assert metadata["Version"] == diffusers_moviegen.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == {"train", "test", "quality", "xformers"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())


def test_constraints_pin_everything_the_package_asks_for(metadata):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[name] = version
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {requirement.name for requirement in requirements if requirement.marker is None} == {
        *("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "peft"),
        *("datasets", "av", "numpy", "pillow", "tqdm"),
    }
    assert all([clause.operator for clause in requirement.specifier] == [">="] for requirement in requirements)
    assert (pins["torch"], pins["diffusers"], pins["transformers"]) == ("2.13.0", "0.42.1", "5.23.0")
    requirements = [requirement for requirement in requirements if requirement.name != "xformers"]
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_wheel_generates_from_another_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    result = subprocess.run(
        [sys.executable, str(site / "bin/moviegen"), "generate", "a red circle", "-o", "picture.png", "--steps", "1"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in work.iterdir()] == ["picture.png"]


# What each part of the package may import of the others; the modules at the top may import all but the command.
IMPORTS = {
    **dict.fromkeys(("schedulers", "loaders", "toybox", "checkpoints", "media", "media_reading"), set()),
    "models": {"loaders"},
    "pipelines": {"models", "schedulers", "loaders"},
    "training": {"models", "media_reading"},
}


def test_imports_run_one_way():
    package = ROOT / "diffusers_moviegen"
    seen = set()
    for path in package.rglob("*.py"):
        names = path.relative_to(ROOT).with_suffix("").parts
        part = names[1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                modules = [".".join([*names[: -node.level], *([node.module] if node.module else [])])]
                if not node.module:
                    modules = [f"{modules[0]}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.startswith("diffusers_moviegen."):
                    imported = module.split(".")[1]
                    seen.add((part, imported))
                    assert imported != "cli", path
                    assert imported == part or part not in IMPORTS or imported in IMPORTS[part], (path, module)
    assert ("pipelines", "models") in seen and ("cli", "pipelines") in seen


def test_no_module_needs_av_or_datasets_to_be_imported():
    program = """
import pkgutil
import sys
sys.modules["av"] = sys.modules["datasets"] = None  # makes `import av` and `import datasets` fail
import diffusers_moviegen
names = [module.name for module in pkgutil.walk_packages(diffusers_moviegen.__path__, "diffusers_moviegen.")]
for name in names:
    __import__(name)
print(len(names))
try:
    import av
except ImportError:
    print("blocked")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    count, blocked = result.stdout.split()
    assert int(count) > 10
    assert blocked == "blocked"
