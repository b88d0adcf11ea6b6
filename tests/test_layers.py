"""The arrow of imports: a file imports only from lower layers, or from its own package, and never in a circle."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxrlhf"

# floors, lowest first: the first part of a module's name below jaxrlhf, or inside run/ the second
FLOORS = (
    ("", "errors", "paths", "types", "tpu"),
    ("algorithm", "sharding", "hosts", "log", "user_code"),
    ("ops", "optim"),
    ("models", "algorithms", "data", "rewards"),
    ("precomputed_answers", "response_widths", "step", "generate"),
    ("config",),
    ("run",),
    ("evaluate", "plan", "serve", "report"),
    ("train",),
    ("benchmarks", "launch", "api", "cli", "__main__"),
)
LAYERS = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# inside run/: what a run is made of, the run, and what is done with it
IN_RUN = (
    (
        "state",
        "export_pad_token",
        "epochs",
        "transfer",
        "manifest",
        "agreed_saves",
        "reader_leases",
        "failed_save_logs",
        "raised_by_all",
    ),
    ("verified_steps",),
    ("saved_run",),
    ("checkpoint", "origins", "resume"),
    ("weights", "tokenizer", "sampler", "runtime"),
    ("original_base",),
    ("export",),
    ("merge",),
    ("build", "bad_batch"),
    ("batch_shapes",),
    ("initial_state", "recorded_asks", "feed", "kept_programs", "pool"),
    ("programs", "normalize", "announce", "ahead", "quantization_mismatch"),
    ("episodes", "turns"),
    ("scoring",),
)
RUN_LAYERS = {f"run.{name}": floor for floor, names in enumerate(IN_RUN) for name in names} | {"run": -1}

# packages that see less than their layer allows
ONLY = {
    "ops": {"types", "sharding", "ops"},  # pure array maths
    # an algorithm reaches networks through Nets alone
    "algorithms": {"types", "algorithm", "ops", "user_code", "errors", "algorithms"},
    "data": {"types", "sharding", "errors", "paths", "hosts", "data"},  # text to tokens on the host
    "rewards": {"types", "user_code", "errors", "hosts", "rewards"},
}

LIGHT = {"typer", "jaxrlhf"}  # what the command may import before one runs, besides the standard library


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """ "" for the package itself, "ops.kl" for jaxrlhf/ops/kl.py."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
# of jaxrlhf itself, these
COMMANDS = {name for name in MODULES if name in ("", "cli", "hosts.exit_codes") or name.startswith("cli.")}


def imports(source: str, modules=MODULES) -> set[str]:
    """The modules of jaxrlhf that the source imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.partition(".")[2] in modules else node.module for name in inside]
        else:
            continue
        found |= {str(name).partition(".")[2] for name in names if str(name).partition(".")[0] == "jaxrlhf"}
    return found


def layer(module: str) -> int:
    """Raises KeyError for a module that has no place in the table."""
    return LAYERS[module.partition(".")[0]]


def wrong_arrows(module: str, targets: set[str]) -> list[str]:
    """The imports of ``module`` that go up, or out of what its package may see."""
    package = module.partition(".")[0]
    wrong = []
    for target in sorted(targets):
        other = target.partition(".")[0]
        inside = package == other == "run" and target != module
        if other != package and layer(target) > layer(module):
            wrong.append(f"{module} (layer {layer(module)}) imports {target} (layer {layer(target)})")
        elif inside and RUN_LAYERS[target] >= RUN_LAYERS[module]:
            wrong.append(f"{module} imports {target}, which is not below it inside run/")
        elif package in ONLY and other not in ONLY[package]:
            wrong.append(f"{module} imports {target}; {package} imports only {', '.join(sorted(ONLY[package]))}")
    return wrong


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path of imports that comes back to where it began; None where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        done.add(module)
        return next((found for other in sorted(graph.get(module, ())) if (found := walk(other, [*path, module]))), None)

    return next((found for module in sorted(graph) if (found := walk(module, []))), None)


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "jaxrlhf")
def test_imports_point_down(module):
    assert wrong_arrows(module, imports(MODULES[module].read_text())) == []


def test_every_name_of_the_order_is_a_module():
    """And every package has a floor: a name that is gone would hide a new module of the same name."""
    assert {name.partition(".")[0] for name in MODULES} == set(LAYERS)
    assert {name for name in MODULES if name.startswith("run.")} == set(RUN_LAYERS) - {"run"}
    assert len(FLOORS) <= 10


def test_no_file_and_no_function_is_too_long():
    sources = {name: path.read_text() for name, path in MODULES.items()}
    assert {name: n for name, text in sources.items() if (n := text.count("\n")) > 450} == {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [(name, node) for name, text in sources.items() for node in ast.walk(ast.parse(text))]
    spans = {f"{name}.{n.name}": (n.end_lineno or 0) - n.lineno + 1 for name, n in functions if isinstance(n, kinds)}
    assert {name: lines for name, lines in spans.items() if lines > 60} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 14  # beside the folders


def test_imports_never_go_in_a_circle():
    # a module of a package has its package's __init__ imported too; that is Python's own order, not an arrow
    assert circle({module: imports(path.read_text()) - {module} for module, path in MODULES.items()}) is None


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_command_line_is_light(name):
    tree = ast.parse(MODULES[name].read_text())
    nodes = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    source = "\n".join(map(ast.unparse, nodes))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) <= LIGHT
    assert imports(source) <= COMMANDS


# ---- the checks themselves can fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("ops.kl", "from jaxrlhf.models import nets", 1),
        ("ops.kl", "def f():\n    import jaxrlhf.config", 1),
        ("algorithms.ppo", "from jaxrlhf.models.transformer import forward", 1),  # lower, but not for algorithms
        ("algorithms.ppo", "from jaxrlhf.sharding import spec", 1),
        ("algorithms.ppo", "from jaxrlhf.algorithms.rm import loss\nfrom jaxrlhf.ops.kl import kl_estimate", 0),
        ("data.sources", "from jaxrlhf.config.record import Config", 1),
        ("data.sources", "from jaxrlhf import models", 1),
        ("step", "import jax, os\nfrom jaxrlhf.types import Batch", 0),
        ("log.metrics", "from jaxrlhf.config.record import Config", 1),
        ("config.record", "from jaxrlhf.log.metrics import LogConfig", 0),
        ("run.state", "from jaxrlhf.run.build import Run", 1),
        ("run.build", "from jaxrlhf.run import state", 0),
    ],
)
def test_a_wrong_arrow_is_found(module, source, wrong):
    modules = {"models.nets", "models", "config", *MODULES}
    assert len(wrong_arrows(module, imports(source, modules))) == wrong


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_two_classes_have_one_name():
    where: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
