"""setup.py: where it finds a CUDA toolkit, and what the wheel and the sdist hold. Builds run on copies of the tree."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "maskdm_fast/lib/libmaskdm_fast_cpu.so"

_spec = importlib.util.spec_from_file_location("maskdm_fast_setup", ROOT / "setup.py")
_setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_setup)


def _script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def _make_toolkit(root, version="13.1"):
    """A folder that looks like a CUDA toolkit; like the real one, its nvcc knows its root only when called in place."""
    in_place = f'case "$0" in {root}/*) echo "#\\$ TOP={root}/bin/.." >&2;; *) echo "#\\$ _HERE_=elsewhere" >&2;; esac'
    release = f'echo "Cuda compilation tools, release {version}, V{version}.80"'
    _script(root / "bin" / "nvcc", f'case "$*" in\n*--dryrun*) {in_place};;\n*--version*) {release};;\nesac')
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    (root / "lib64").mkdir()
    return root


@pytest.fixture
def places(tmp_path):
    """Three toolkits of different versions, and PATH with the system's own folders behind one that tests fill."""
    toolkits = {name: _make_toolkit(tmp_path / name, f"13.{i}") for i, name in enumerate(("home", "standard", "path"))}
    (tmp_path / "bin").mkdir()
    return toolkits | {"bin": tmp_path / "bin", "PATH": f"{tmp_path / 'bin'}:/bin", "nowhere": tmp_path / "nowhere"}


def test_cuda_home_comes_first(places):
    environ = {"CUDA_HOME": str(places["home"]), "PATH": f"{places['path'] / 'bin'}:/bin"}
    found = _setup.find_cuda_toolkit(environ, str(places["standard"]))
    assert found == {"root": str(places["home"]), "found_by": "CUDA_HOME", "version": "13.0"}


def test_the_standard_location_comes_before_path(places, tmp_path):
    (tmp_path / "link").symlink_to(places["standard"])  # as /usr/local/cuda links to the newest version
    environ = {"PATH": f"{places['path'] / 'bin'}:/bin"}
    found = _setup.find_cuda_toolkit(environ, str(tmp_path / "link"))
    assert found == {"root": str(places["standard"]), "found_by": "standard location", "version": "13.1"}


@pytest.mark.parametrize("kind", ["in place", "wrapper", "link", "link to a wrapper", "relative link"])
def test_nvcc_on_path_leads_to_its_root(places, tmp_path, kind):
    real, shim = places["path"] / "bin" / "nvcc", places["bin"] / "nvcc"
    environ = {"PATH": places["PATH"]}
    if kind == "in place":
        environ["PATH"] = f"{real.parent}:/bin"
    elif kind == "wrapper":
        _script(shim, f'exec {real} "$@"')
    elif kind == "link":
        shim.symlink_to(real)
    elif kind == "link to a wrapper":
        shim.symlink_to(_script(tmp_path / "elsewhere" / "compiler", f'exec {real} "$@"'))
    else:
        shim.symlink_to(os.path.relpath(real, shim.parent))
    found = _setup.find_cuda_toolkit(environ, str(places["nowhere"]))
    assert found == {"root": str(places["path"]), "found_by": "nvcc on PATH", "version": "13.2"}


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h", "lib64", "permission to run nvcc"])
def test_an_incomplete_root_is_passed_over(places, missing):
    home = places["home"]
    if missing == "lib64":
        (home / missing).rmdir()
    elif missing.startswith("permission"):
        (home / "bin" / "nvcc").chmod(0o644)
    else:
        (home / missing).unlink()
    found = _setup.find_cuda_toolkit({"CUDA_HOME": str(home), "PATH": ""}, str(places["standard"]))
    assert found["found_by"] == "standard location"


def test_a_missing_toolkit_says_where_it_was_looked_for(places):
    nvcc = _script(places["bin"] / "nvcc", "exit 1")
    environ = {"CUDA_HOME": str(places["nowhere"]), "PATH": places["PATH"]}
    found = _setup.find_cuda_toolkit(environ, f"{places['nowhere']}/standard")
    assert found == {
        "missing": "no CUDA toolkit with bin/nvcc, include/cuda_runtime.h and lib64/ at: "
        f"{places['nowhere']} (CUDA_HOME), {places['nowhere']}/standard (standard location), {nvcc} (nvcc on PATH)"
    }


def test_no_environment_at_all(places):
    assert "missing" in _setup.find_cuda_toolkit({}, str(places["nowhere"]))


def _run(*command, cwd, **environ):
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("MASKDM_", "PYTHON", "CXX"))}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        env=cleared | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _build_wheel(tree, out, **environ):
    """Run pip as the README says; return its output and the wheel, None if the build failed."""
    command = ("pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out, ".")
    result = _run(*command, cwd=tree, **environ)
    wheels = list(Path(out).glob("*.whl"))
    assert (result.returncode == 0) == (len(wheels) == 1), result.stdout
    return result.stdout, wheels[0] if wheels else None


@pytest.fixture(scope="module")
def tree(project_files, tmp_path_factory):
    """A copy of the project's files, as a fresh clone has them."""
    copy = tmp_path_factory.mktemp("tree")
    for path in project_files:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return copy


@pytest.fixture(scope="module")
def unpacked_sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    result = _run("build", "--sdist", "--no-isolation", "--outdir", out, cwd=tree)
    assert result.returncode == 0, result.stdout
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


def test_the_sdist_holds_all_of_the_project(project_files, unpacked_sdist):
    packed = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    missing = {path.relative_to(ROOT).as_posix() for path in project_files} - packed
    assert missing == set()
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


_USE = """
import json, torch, maskdm_fast
from maskdm_fast import ops
from maskdm_fast.ops import backend
ids_keep = torch.tensor([[2, 0]])
out = ops.gather_tokens(torch.arange(6.0).view(1, 3, 2), ids_keep)
status = backend.status(ops.IMPLEMENTATIONS)["gather_tokens"]
status = {name: status[name] for name in ("reference", "cpu", "cuda")}
print(json.dumps({"file": maskdm_fast.__file__, "out": out.tolist(), **status}))
"""


def _use_installed(wheel, tmp_path):
    """Install the wheel in a folder of its own and call an op there, away from the checkout."""
    target = tmp_path / "installed"
    command = ("pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    result = _run(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    environ = {**os.environ, "PYTHONPATH": str(target)}
    used = subprocess.run([sys.executable, "-c", _USE], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    found = json.loads(used.stdout)
    assert found.pop("file").startswith(str(target))
    assert found.pop("out") == [[[4.0, 5.0], [0.0, 1.0]]]
    return found


@pytest.fixture
def broken_toolkit(tmp_path):
    """A CUDA toolkit that is whole to look at, and whose nvcc compiles nothing."""
    return str(_make_toolkit(tmp_path / "broken"))


def test_the_wheel_of_the_sdist(project_files, unpacked_sdist, broken_toolkit, tmp_path):
    """The longest way from the repository to an installation; one test, because it compiles the kernels.

    Those for the CPU alone: nvcc takes minutes for its own, and a broken one must not cost the others.
    """
    output, wheel = _build_wheel(unpacked_sdist, tmp_path, MASKDM_WITH_NATIVE="1", CUDA_HOME=broken_toolkit)
    assert wheel is not None, output
    assert "installed WITHOUT its CUDA kernels" in output and "WITHOUT its native kernels" not in output
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")

    names = set(zipfile.ZipFile(wheel).namelist())
    names = {name for name in names if ".dist-info/" not in name}
    tracked = {path.relative_to(ROOT).as_posix() for path in project_files}
    modules = {name for name in tracked if name.startswith("maskdm_fast/") and name.endswith(".py")}
    assert names - modules == {LIBRARY, "maskdm_fast/lib/build.json", "maskdm_fast/eval/report.html.j2"}
    assert modules - names == set()
    record = json.loads(zipfile.ZipFile(wheel).read("maskdm_fast/lib/build.json"))
    assert set(record) == {"cuda_toolkit", "cuda_failed", "compiler", "built_with_torch"}

    found = _use_installed(wheel, tmp_path)
    assert "the CUDA kernels did not compile" in found.pop("cuda")
    assert found == {"reference": "ok", "cpu": "ok"}


def test_cuda_kernels_that_were_asked_for_must_compile(tree, broken_toolkit, tmp_path):
    output, path = _build_wheel(tree, tmp_path, MASKDM_WITH_CUDA="1", CUDA_HOME=broken_toolkit)
    assert path is None
    assert "failed with exit code" in output


def test_an_old_setuptools_is_told_from_a_new_one(tree, tmp_path):
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"\n')
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "setup.py"], cwd=tree, env=environ, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("maskdm_fast builds with setuptools >= 77, this is 65.5.0: pip install")


def test_settings_that_contradict_each_other_are_an_error(tree, tmp_path):
    output, path = _build_wheel(tree, tmp_path, MASKDM_WITH_NATIVE="0", MASKDM_WITH_CUDA="1")
    assert path is None
    assert "MASKDM_WITH_NATIVE=0 declines all kernels" in output


def test_kernels_compile_without_cuda_where_it_is_declined(tmp_path, monkeypatch):
    built = []
    command = _setup.BuildNative(_setup.Distribution())
    monkeypatch.setattr(command, "compile", lambda target, nvcc=None: built.append(nvcc) or {})
    monkeypatch.setenv("MASKDM_WITH_CUDA", "0")
    assert command.compile_all(tmp_path, {"root": "toolkit"}) == {}
    monkeypatch.setenv("MASKDM_WITH_CUDA", "1")
    assert command.compile_all(tmp_path, {"root": "toolkit"}) == {"cuda_compiler": "toolkit/bin/nvcc"}
    assert built == [None, Path("toolkit/bin/nvcc")]
    with pytest.raises(RuntimeError, match="MASKDM_WITH_CUDA=1, and no CUDA toolkit"):
        command.compile_all(tmp_path, {"missing": "no CUDA toolkit at: nowhere"})


def test_two_builds_of_one_checkout_keep_apart(tmp_path, monkeypatch):
    """The second is begun and ended while the first is under way."""
    folders = []

    def call(command, arguments):
        if "-B" not in arguments:
            assert Path(arguments[2], "CMakeCache.txt").exists()
            return
        folders.append(Path(arguments[arguments.index("-B") + 1]))
        assert not (folders[-1] / "CMakeCache.txt").exists()
        (folders[-1] / "CMakeCache.txt").write_text("CMAKE_CXX_COMPILER:FILEPATH=/bin/c++\n")
        if len(folders) == 1:
            command.compile(tmp_path)

    monkeypatch.setattr(_setup.BuildNative, "call", call)
    command = _setup.BuildNative(_setup.Distribution())
    command.build_temp = str(tmp_path / "build")
    assert command.compile(tmp_path)["compiler"] == "/bin/c++"
    assert len(set(folders)) == 2
    assert list((tmp_path / "build").iterdir()) == []


_TOOLKIT = _setup.find_cuda_toolkit(dict(os.environ))


@pytest.mark.skipif("missing" in _TOOLKIT, reason="needs nvcc")
def test_a_cmake_that_does_not_know_how_nvcc_is_asked_for_its_standard(tmp_path):
    """As CMake before 3.25.2: it refused to configure the CUDA library, which was then left out."""
    (tmp_path / "forget.cmake").write_text("unset(CMAKE_CUDA20_STANDARD_COMPILE_OPTION)\n")
    command = [_setup._find_tool("cmake"), "-G", "Unix Makefiles", "-S", ROOT, "-B", tmp_path / "build"]
    command += [f"-DCMAKE_CUDA_COMPILER={_TOOLKIT['root']}/bin/nvcc"]
    command += [f"-DCMAKE_USER_MAKE_RULES_OVERRIDE_CUDA={tmp_path / 'forget.cmake'}", f"-DTORCH_LIB_DIR={tmp_path}"]
    command += [f"-DTORCH_INCLUDE_DIR={tmp_path}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    flags = (tmp_path / "build/CMakeFiles/maskdm_fast_cuda.dir/flags.make").read_text()
    assert "-std=c++20" in flags.partition("CUDA_FLAGS")[2].splitlines()[0]


@pytest.fixture(scope="module")
def without_compiler(tree, tmp_path_factory):
    return _build_wheel(tree, tmp_path_factory.mktemp("without"), CXX=shutil.which("false"))


def test_without_a_compiler_the_build_goes_on_and_says_so(without_compiler):
    output, path = without_compiler
    assert "installed WITHOUT its native kernels" in output
    assert "C++20 compiler" in output
    names = zipfile.ZipFile(path).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "failed with exit code" in json.loads(zipfile.ZipFile(path).read("maskdm_fast/lib/build.json"))["failed"]


def test_without_kernels_the_package_runs_on_the_reference(without_compiler, tmp_path):
    found = _use_installed(without_compiler[1], tmp_path)
    assert found["reference"] == "ok"
    assert "the native library is not built" in found["cpu"]


def test_kernels_that_were_asked_for_must_compile(tree, tmp_path):
    output, path = _build_wheel(tree, tmp_path, CXX=shutil.which("false"), MASKDM_WITH_NATIVE="1")
    assert path is None
    assert "failed with exit code" in output


def test_kernels_that_were_declined_are_not_missed(tree, tmp_path):
    output, path = _build_wheel(tree, tmp_path, CXX=shutil.which("false"), MASKDM_WITH_NATIVE="0")
    assert "WITHOUT" not in output
    assert LIBRARY not in zipfile.ZipFile(path).namelist()


def test_a_misspelt_setting_is_an_error(tree, tmp_path):
    output, path = _build_wheel(tree, tmp_path, MASKDM_WITH_NATIVE="off")
    assert path is None
    assert "MASKDM_WITH_NATIVE is 'off', want 0 or 1" in output
