"""The package as a whole: what importing it does, and that each file has one place."""

import subprocess
import sys
from pathlib import Path

import dsv4_compile

REPOSITORY = Path(__file__).parents[1]


def test_import_needs_no_gpu_and_no_kernel_compiler() -> None:
    """Guards against a module-level import of a kernel, which would take seconds and demand cutlass on every machine."""
    program = (
        "import sys, dsv4_compile, torch; "
        "print(sorted({'cutlass', 'tvm_ffi', 'transformers'} & set(sys.modules)), torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[] False"


def test_first_operator_imports_no_compiler() -> None:
    """Guards against two seconds before the first kernel: ``torch._check`` imports sympy even where nothing is wrong."""
    program = (
        "import sys, torch, dsv4_compile.ops as ops; "
        "x = ops.quantize_nvfp4(torch.ones(2, 64), 'tensor'); ops.nvfp4_mm(*x, *([part] for part in x)); "
        "print(sorted({'sympy', 'torch._dynamo', 'torch.fx.experimental.symbolic_shapes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"


def test_folders_at_the_top_are_the_packages() -> None:
    """Guards against a copy in place of a symlink (git without core.symlinks), whose two sides would drift apart."""
    package = Path(dsv4_compile.__file__).parent
    assert (package / "ops").resolve() == REPOSITORY / "ops"
    assert (package / "passes").resolve() == REPOSITORY / "passes"


def test_every_folder_with_python_files_is_a_package() -> None:
    """Guards against a folder that works from the source tree and is missing from the wheel."""
    folders = {path.parent for top in ("dsv4_compile", "ops", "passes") for path in (REPOSITORY / top).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()
