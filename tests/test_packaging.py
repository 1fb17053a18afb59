"""What is built and published: contents of the wheel, its metadata, and versions stated twice.

That the wheel installs and trains in an empty environment is checked by `.ci/run wheel`.
"""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nanochat_jax/__init__.py").read_text())[1]
RESOURCES = {".html", ".json", ".typed"}  # what the package may hold besides Python


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a distribution with the installed hatchling, so without the network."""
    pytest.importorskip("hatchling", reason="extra 'test'")
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return zipfile.ZipFile(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def expected() -> set[str]:
    """Files of the wheel, its metadata aside: the package, and the configs inside it."""
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nanochat_jax").rglob("*") if p.is_file()}
    configs = {f"nanochat_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    return {name for name in files | configs if "__pycache__" not in name}


@pytest.mark.slow
def test_wheel_holds_the_package_the_configs_and_nothing_else(wheel):
    info = f"nanochat_jax-{VERSION}.dist-info/"
    names = set(wheel.namelist())
    assert {name for name in names if not name.startswith(info)} == expected()
    assert {name.removeprefix(info) for name in names if name.startswith(info)} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip
    assert {"nanochat_jax/py.typed", "nanochat_jax/configs/smoke.py"} <= names
    strange = {n for n in expected() if not n.endswith(".py") and Path(n).suffix not in RESOURCES}
    assert {n for n in strange if Path(n).name != "py.typed"} == set()


@pytest.mark.slow
def test_metadata(wheel):
    info = f"nanochat_jax-{VERSION}.dist-info/"
    metadata = email.message_from_bytes(wheel.read(info + "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("nanochat_jax", VERSION)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == PROJECT["project"]["requires-python"]
    assert metadata.get_payload().startswith("# nanochat_jax")
    assert b"nanochat-jax = nanochat_jax.cli:main" in wheel.read(info + "entry_points.txt")
    plain = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    heavy = re.compile(r"^(torch|tensorflow|transformers|jax\[tpu\]|jax\[cuda)")
    assert plain and not [r for r in plain if heavy.match(r)]


@pytest.mark.slow
def test_wheel_from_the_source_distribution_is_the_same(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = zipfile.ZipFile(build("wheel", tmp_path / f"nanochat_jax-{VERSION}", tmp_path / "dist"))
    assert again.namelist() == wheel.namelist()
    assert all(again.read(name) == wheel.read(name) for name in wheel.namelist())


@pytest.mark.slow
def test_source_distribution_holds_no_leftovers(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"LICENSE", "README.md", "tests/conftest.py", "configs/smoke.py"} <= set(names)
    assert [n for n in names if re.search(r"__pycache__|\.pyc$|^runs/|^\.venv|_cache/|\.hypothesis", n)] == []


def test_dependency_groups_mirror_the_extras():
    extras, groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
    assert {name: extras[name] for name in groups} == groups


def test_pre_commit_has_the_versions_of_the_dev_extra():
    pins = dict(r.split("==") for r in PROJECT["project"]["optional-dependencies"]["dev"] if "==" in r)
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    for hook, package in {"ruff-pre-commit": "ruff", "codespell": "codespell"}.items():
        found = re.search(rf"repo: \S+/{hook}\n\s+rev: v(\S+)", text)
        assert found and found[1] == pins[package]
    assert "pyright" in pins and "language: system" in text  # the hook runs the dev extra's own


def test_version_is_the_same_everywhere():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + lowest.replace(".", "")
    assert PROJECT["tool"]["pyright"]["pythonVersion"] == lowest
    assert f"Programming Language :: Python :: {lowest}" in PROJECT["project"]["classifiers"]
