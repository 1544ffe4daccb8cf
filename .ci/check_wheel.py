"""Builds sdist and wheel, looks inside, and imports the wheel from a scratch folder, far from the source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Runs in the scratch environment. argv: its site-packages.
PROBE = """
import importlib.machinery, importlib.metadata, sys
from pathlib import Path

site = Path(sys.argv[1])
assert importlib.machinery.PathFinder.find_spec("ops", [str(site)]) is None, "a top-level `ops` reached site-packages"
assert importlib.machinery.PathFinder.find_spec("passes", [str(site)]) is None, "a top-level `passes` reached it too"

from torch._dynamo.backends.registry import lookup_backend
backend = lookup_backend("dsv4")  # by its entry point: nothing of ours is imported yet

import dsv4_compile, dsv4_compile.ops, dsv4_compile.passes
for module in (dsv4_compile, dsv4_compile.ops, dsv4_compile.passes, sys.modules[backend.__module__]):
    assert Path(module.__file__).is_relative_to(site), f"{module.__name__} comes from {module.__file__}"
assert "cutlass" not in sys.modules, "`import dsv4_compile` imports cutlass"
print("imported", importlib.metadata.version("dsv4-compile"), "from the wheel; backend dsv4 is", backend)
"""


def python_files() -> set[str]:
    """Every module of the source tree, named as the wheel must name it."""
    return {
        f"dsv4_compile/{path.relative_to(REPOSITORY).as_posix().removeprefix('dsv4_compile/')}"
        for top in ("dsv4_compile", "ops", "passes")
        for path in (REPOSITORY / top).rglob("*.py")  # rglob does not enter the symlinks
    }


def check_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    strangers = {top for top in tops if top != "dsv4_compile" and not top.endswith(".dist-info")}
    missing = (python_files() | {"dsv4_compile/py.typed"}) - names
    extra = {name for name in names if name.endswith(".py")} - python_files()
    if strangers or missing or extra or not any(name.endswith("/licenses/LICENSE") for name in names):
        sys.exit(f"{wheel.name}: strangers {sorted(strangers)}, missing {sorted(missing)}, extra {sorted(extra)}")
    print(f"{wheel.name}: {len(names)} files, every module once")


def check_import(wheel: Path, scratch: Path) -> None:
    """Installs the wheel alone; its dependencies come from this environment, whose own dsv4-compile stays unseen."""
    environment = scratch / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(environment), "platbase": str(environment)}))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([*install, "--disable-pip-version-check"], check=True)
    # A path named in a .pth file is searched, but its own .pth files, the editable install's among them, are not run.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if subprocess.run([python, "-c", PROBE, site], check=False, cwd=scratch, env=elsewhere).returncode:
        sys.exit(f"{wheel.name}: installed alone, it does not import; the line above says why")
    command = [environment / "bin" / "dsv4-compile", "--help"]
    if subprocess.run(command, check=False, cwd=scratch, env=elsewhere, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"{wheel.name}: `dsv4-compile --help` fails")


def main() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="dsv4-compile-wheel-"))
    try:
        build = [sys.executable, "-m", "build", "--outdir", str(scratch), str(REPOSITORY)]
        result = subprocess.run(build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode:
            sys.exit(result.stdout)
        (wheel,) = scratch.glob("*.whl")
        check_contents(wheel)
        check_import(wheel, scratch)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
