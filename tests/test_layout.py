"""The rules of the code base that no single test of behaviour would notice: who imports whom, who may ask what."""

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from maskdm_fast import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "maskdm_fast"

# What each part of the package may import besides itself and the root; `cli`, `commands` and `demo` are the top.
BASE = {"random", "testing"}
BESIDE_EACH_OTHER = ("optim", "diffusion", "models", "data", "eval")
ALLOWED = {
    "": set(),
    "random": set(),
    "testing": {"random"},
    "ops": BASE,
    **{part: {"random", "ops"} for part in BESIDE_EACH_OTHER},
    "distill": {"random", "ops", *BESIDE_EACH_OTHER},
    "train": {"random", "ops", *BESIDE_EACH_OTHER, "distill"},
}
TOP = ("cli", "commands", "demo", "__main__")
HEAVY = {
    *("triton", "xformers", "apex", "deepspeed"),
    *("tyro", "tqdm", "PIL", "safetensors", "torchmetrics", "matplotlib", "jinja2"),
}

ANATOMY = ("__init__.py", "op.py", "reference.py", "native_impl.py", "cases.py", "cost.py")
MAX_LINES = 400
MAX_REFERENCE_LINES = 59

# Draws and generators that depend on state; maskdm_fast.random replaces them all.
GLOBAL_RNG = re.compile(
    r"numpy\.random\b|torch\.random\b|"
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|binomial)(_like)?$|"
    r"torch\.(manual_seed|seed|initial_seed|get_rng_state|set_rng_state|default_generator|Generator)$|"
    r"torch\.nn\.(init\.|(functional\.)?\w*[dD]ropout)"
)
RNG_METHODS = {
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_"),
    *("bernoulli", "multinomial"),
}
HARDWARE = re.compile(r"torch\.(cuda|mps|xpu|mtia|accelerator|backends|cpu|version)\.")
ORDER_OF_WORK = re.compile(r"torch\.cuda\.(Stream|Event|stream|current_stream|CUDAGraph|graph|graph_pool_handle)$")


@dataclass
class Module:
    """A parsed file of the package, with its imports and the dotted names it uses written out in full."""

    path: Path
    name: str
    tree: ast.Module
    imports: list[tuple[int, str]] = field(default_factory=list)
    uses: list[tuple[int, str]] = field(default_factory=list)

    @property
    def part(self) -> str:
        """The first name below maskdm_fast: "ops", "train", "cli", ...; "" for the root."""
        return (self.name.split(".") + [""])[1]

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def _parse(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    module = Module(path, name, ast.parse(path.read_text("utf-8")))
    full_names: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.imports.append((node.lineno, alias.name))
                full_names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                anchor = package[: len(package) - node.level + 1]
                base = ".".join([*anchor, base]) if base else ".".join(anchor)
            for alias in node.names:
                module.imports.append((node.lineno, f"{base}.{alias.name}"))
                full_names[alias.asname or alias.name] = f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__", "require"):
                module.imports.append((node.lineno, str(node.args[0].value)))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            names, inner = [], node
            while isinstance(inner, ast.Attribute):
                names.append(inner.attr)
                inner = inner.value
            head = full_names.get(inner.id, inner.id) if isinstance(inner, ast.Name) else "?"
            module.uses.append((node.lineno, ".".join([head, *reversed(names)])))
    return module


@cache
def _modules() -> tuple[Module, ...]:
    return tuple(_parse(path) for path in sorted(PACKAGE.rglob("*.py")))


def _report(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(dict.fromkeys(violations))


def _components() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_directions_of_import():
    """csrc <- ops <- optim, diffusion, models, data, eval <- distill <- train <- cli."""
    violations = []
    for module in _modules():
        if module.part in TOP:
            continue
        assert module.part in ALLOWED, f"{module.name}: name its place in ALLOWED"
        for line, name in module.imports:
            head, _, rest = name.partition(".")
            imported = rest.split(".")[0]
            if head != "maskdm_fast" or imported not in _components() or imported == module.part:
                continue
            if imported not in ALLOWED[module.part]:
                violations.append(f"{module.where(line)}: {module.part or 'the root'} imports {name}")
    _report(violations)


def test_only_cases_import_the_test_runner():
    _report(
        [
            f"{module.where(line)}: imports {name}"
            for module in _modules()
            for line, name in module.imports
            if name.startswith("maskdm_fast.testing") and module.path.name != "cases.py"
        ]
    )


def test_nothing_imports_tests_or_benchmarks():
    _report(
        [
            f"{module.where(line)}: imports {name}"
            for module in _modules()
            for line, name in module.imports
            if name.split(".")[0] in ("tests", "benchmarks", "conftest", "pytest")
        ]
    )


@pytest.mark.parametrize(
    ("package", "place"),
    [
        ("triton", "triton_*.py"),
        ("xformers", "masked_attention/xformers_impl.py"),
        ("deepspeed", "train/zero_engine.py"),
        ("apex", "optim/nvidia_apex.py"),
    ],
)
def test_one_place_imports(package, place):
    _report(
        [
            f"{module.where(line)}: imports {name}; only {place} may"
            for module in _modules()
            for line, name in module.imports
            if name.split(".")[0] == package and not fnmatch(module.path.as_posix(), f"*/{place}")
        ]
    )


def test_only_the_backend_asks_what_hardware_there_is():
    """`ops/streams.py` orders the work of a device that others have found."""

    def allowed(module: Module, name: str) -> bool:
        return module.name == "maskdm_fast.ops.backend" or (
            module.name == "maskdm_fast.ops.streams" and ORDER_OF_WORK.match(name) is not None
        )

    _report(
        [
            f"{module.where(line)}: {name}; ask maskdm_fast.ops.backend"
            for module in _modules()
            for line, name in module.uses + module.imports
            if HARDWARE.match(name) and not allowed(module, name)
        ]
    )


def test_no_draw_from_a_global_generator():
    violations = []
    for module in _modules():
        for line, name in module.uses + module.imports:
            stdlib = re.match(r"random(\.|$)", name) and not (
                module.path.name == "cases.py" and name in ("random", "random.Random")
            )
            if stdlib or GLOBAL_RNG.match(name):
                violations.append(f"{module.where(line)}: {name}; draw from maskdm_fast.random")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RNG_METHODS:
                violations.append(f"{module.where(node.lineno)}: .{node.func.attr}(); draw from maskdm_fast.random")
    _report(violations)


def _new_modules(statement: str, after: str = "") -> set[str]:
    code = f"import sys\n{after}\nbefore = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.split(".")[0] for name in result.stdout.split()}


def test_the_root_loads_nothing_heavy():
    assert _new_modules("import maskdm_fast") - set(sys.stdlib_module_names) == {"maskdm_fast"}


def test_ops_load_only_torch():
    loaded = _new_modules("import maskdm_fast.ops", after="import torch")
    assert "maskdm_fast" in loaded
    assert loaded & HEAVY == set()


def test_no_long_file(project_files):
    violations = []
    for path in project_files:
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            limit = MAX_REFERENCE_LINES if path.name == "reference.py" else MAX_LINES
            lines = len(path.read_text("utf-8").splitlines())
            if lines > limit:
                violations.append(f"{path.relative_to(ROOT)}: {lines} lines, want {limit} at most")
    _report(violations)


def test_every_op_has_all_its_files():
    folders = {path.name for path in (PACKAGE / "ops").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ops.IMPLEMENTATIONS), "ops/__init__.py lists other ops than the folders of ops/"
    wanted = [PACKAGE / "ops" / op / name for op in folders for name in ANATOMY]
    for op in folders:
        wanted += [ROOT / "csrc" / op / name for name in (f"{op}.h", f"{op}_cpu.cpp", f"{op}_bind.cpp")]
        if "cuda" in ops.IMPLEMENTATIONS[op]:
            wanted += [ROOT / "csrc" / op / name for name in (f"{op}_cuda.cu", f"{op}_bind_cuda.cpp", "schema.h")]
            wanted += [PACKAGE / "ops" / op / name for name in ("triton_impl.py", "fakes.py")]
    _report([f"{path.relative_to(ROOT)} is missing" for path in wanted if not path.exists()])


def test_cmake_builds_every_op():
    with_cuda = {op for op, table in ops.IMPLEMENTATIONS.items() if "cuda" in table}
    for variable, suffix, wanted in (("OPS", "cpu.cpp", set(ops.IMPLEMENTATIONS)), ("CUDA_OPS", "cuda.cu", with_cuda)):
        listed = re.search(rf"^set\({variable}\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
        assert sorted(listed[1].split()) == sorted(wanted), variable
        sources = {path.parent.name for path in (ROOT / "csrc").glob(f"*/*_{suffix}")}
        assert sources == wanted, f"csrc has other ops with {suffix} than ops/__init__.py"


def _public_functions(module: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }


def test_every_backend_of_every_op_has_the_same_functions():
    """Two kinds: our kernels, whose gradients the autograd function of the op joins, and other libraries, which bring
    theirs along. All of one kind can stand for each other."""
    violations = []
    for op, backends in ops.IMPLEMENTATIONS.items():
        op_module = importlib.import_module(f"maskdm_fast.ops.{op}.op")
        ours, others = op_module.IMPL, getattr(op_module, "INTEROP", {})
        assert backends == ours | others and not ours.keys() & others.keys(), op
        for table in filter(None, (ours, others)):
            functions = {backend: _public_functions(module) for backend, module in table.items()}
            missing = {backend: set.union(*functions.values()) - names for backend, names in functions.items()}
            violations += [f"{op}: backend {backend} has no {names}" for backend, names in missing.items() if names]
    _report(violations)


def test_ground_truth_does_not_dispatch():
    """A reference that called another backend would be compared with itself."""
    violations = []
    for module in _modules():
        if module.path.name == "reference.py":
            for line, name in module.imports + module.uses:
                if re.match(r"torch\.ops|maskdm_fast\.(?!random\b|ops\.checks\b)", name):
                    violations.append(f"{module.where(line)}: {name}")
    _report(violations)


def test_kernels_are_plain_cpp():
    """Any compiler can build them anywhere: no header of torch, and the caller owns the threads."""
    forbidden = re.compile(
        r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h|thread|future|pthread|omp\.h|common/bind(_cuda)?\.h)|"
        r"#\s*pragma\s+omp\s+(?!simd|declare\s+simd)|\bstd::(thread|jthread|async)\b|\bpthread_|\bparallel_for\b"
    )
    violations = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        is_glue = re.search(r"_bind(_cuda)?\.(cpp|h)$", path.name) or path.name in ("bind.h", "bind_cuda.h", "isa.cpp")
        if path.suffix in (".h", ".cpp", ".cu") and not is_glue:
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if forbidden.search(line):
                    violations.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    _report(violations)


def test_cuda_kernels_can_be_emulated_and_captured():
    """The emulation knows neither <<<>>> nor static shared memory; a captured graph may not wait, allocate or copy."""
    forbidden = re.compile(
        r"#\s*include\s*[<\"](cuda|emulation/)|<<<|__shared__|"
        r"\bcuda(\w*Synchronize|Malloc\w*|Free\w*|Memcpy\w*|Memset\w*|EventQuery|StreamQuery)\b"
    )
    violations = []
    for path in sorted((ROOT / "csrc").glob("*/*_cuda.*")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if forbidden.search(line):
                violations.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    _report(violations)


def test_bindings_use_the_stable_abi():
    violations = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp"):
            for include in re.findall(r"#\s*include\s*<((?:torch|ATen|c10)/[^>]*)>", path.read_text("utf-8")):
                if not include.startswith(("torch/csrc/stable/", "torch/headeronly/")):
                    violations.append(f"{path.relative_to(ROOT)}: includes <{include}>")
    _report(violations)


def _public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def _documented_methods() -> set[str]:
    """Methods that a Protocol documents; the classes that follow it need not say the same again."""
    return {
        method.name
        for module in _modules()
        for node in _public(module.tree.body)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
        for method in _public(node.body)
        if ast.get_docstring(method) is not None
    }


def test_every_public_name_has_a_docstring():
    """Backends and cases are exempt: their functions are named once, in ops/<op>/op.py and testing.py."""
    violations = []
    said_elsewhere = _documented_methods() | {"forward"}  # `forward` is what the class docstring describes
    for module in _modules():
        empty_init = module.path.name == "__init__.py" and not module.tree.body
        if not empty_init and ast.get_docstring(module.tree) is None:
            violations.append(f"{module.where(1)}: the module has no docstring")
        if module.path.name in ("reference.py", "cases.py") or module.path.name.endswith("_impl.py"):
            continue
        for node in _public(module.tree.body):
            methods = _public(node.body) if isinstance(node, ast.ClassDef) else []
            for public in [node, *(method for method in methods if method.name not in said_elsewhere)]:
                if ast.get_docstring(public) is None:
                    violations.append(f"{module.where(public.lineno)}: {public.name} has no docstring")
    _report(violations)


def test_no_word_about_one_machine_or_one_sitting(project_files):
    forbidden = re.compile(
        r"(?<![\w.$~)}\]/-])/(?:home|root|work|tmp|mnt|Users|workspace)/\w|"
        r"\b(?:previous|earlier|last|next|another) session\b|\bissue #?\d",
        re.IGNORECASE,
    )
    violations = []
    for path in project_files:
        if path.suffix not in (".py", ".cpp", ".h", ".cu", ".md", ".toml", ".txt", ".in", ".j2", ""):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if forbidden.search(line):
                violations.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    _report(violations)
