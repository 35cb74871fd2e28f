"""The house: each floor imports only from those below it, and only the bottom one touches the insides of torch."""

import ast
import types
from pathlib import Path

import pytest

import functional_lstsq as fl

ROOT = Path(fl.__file__).parent
# From bottom to top; "" for what stands in no folder, which is what users call, but for what says how a solve ended.
FLOORS = ("torch_func", "sparse", "solvers", "linear", "fits", "distributed", "", "cli")
ANYWHERE = ("result", "errors")  # on every floor above torch_func
FILES = sorted(ROOT.rglob("*.py"))
LONGEST = 320  # lines

at_each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def trees():
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def floor_of(parts):
    """The number of the floor on which a module stands, given by its names below the package."""
    if parts[:1] in (("__init__",), ("__main__",)):  # the house as a whole, and its front door
        return len(FLOORS)
    return FLOORS.index(parts[0] if parts and (ROOT / parts[0]).is_dir() else "")


def imported(path, tree):
    """The modules of the package that a file imports, wherever in it, as tuples of names below the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("functional_lstsq", *path.relative_to(ROOT).parent.parts)
            base = base[: len(base) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            # What is imported from a folder may be a module in it, or a name of its __init__.
            found = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for module in found:
            if module[0] == "functional_lstsq":
                parts = module[1:]
                while parts and not (
                    (ROOT / Path(*parts)).is_dir() or (ROOT / Path(*parts)).with_suffix(".py").exists()
                ):
                    parts = parts[:-1]
                yield parts or ("__init__",)


@at_each_file
def test_imports_run_downward(path):
    here = path.relative_to(ROOT).with_suffix("").parts
    for module in imported(path, ast.parse(path.read_text(encoding="utf-8"))):
        if module[0] in ANYWHERE:
            assert here[0] != "torch_func", f"the bottom floor imports {module[0]}"
        elif module == ("__init__",):
            assert here[0] == "cli" or here == ("__main__",), "only the command line imports the package as a whole"
        elif here[0] in ANYWHERE:
            assert module[0] == "torch_func", f"imports {'.'.join(module)}"
        else:
            assert floor_of(module) <= floor_of(here), f"imports {'.'.join(module)}, which stands above it"


def test_the_package_imports_nothing_of_the_command_line_but_its_signals():
    """Before torch is imported a signal may come; so what handles it is imported first, and imports nothing of ours."""
    package = list(imported(ROOT / "__init__.py", ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))))
    assert [module for module in package if module[0] == "cli"] == [package[0]] == [("cli", "command")]
    command = ROOT / "cli" / "command.py"
    assert not list(imported(command, ast.parse(command.read_text(encoding="utf-8"))))


def test_no_module_is_in_a_circle():
    """Imports that stand in a folder or in what users call make no circle either, those inside functions included."""
    below = {}
    for path, tree in trees():
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        below[name] = {module for module in imported(path, tree) if module not in (name, ("__init__",))}
    while below:
        free = [name for name, needed in below.items() if not needed & below.keys()]
        assert free, f"a circle among {sorted('.'.join(name) for name in below)}"
        for name in free:
            del below[name]


def dotted(node):
    """`torch._C.x` of a syntax tree as text; "" for what is no such chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@at_each_file
def test_only_the_bottom_floor_touches_the_insides_of_torch(path):
    named = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            named.append(dotted(node))
    inside = [name for name in named if f"{name}.".startswith(("torch._C.", "torch._functorch."))]
    assert not inside or path.parent.name == "torch_func", inside


def test_the_package_shows_public_names_only():
    assert sorted(dir(fl)) == sorted(fl.__all__)
    modules = {name for name in dir(fl) if isinstance(getattr(fl, name), types.ModuleType)}
    assert modules == {"distributed", "plot"}
    assert not any(name.startswith("_") for name in dir(fl))


def test_no_module_stands_in_the_place_of_a_public_function():
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(["functional_lstsq", *(parts[:-1] if parts[-1] == "__init__" else parts)])
        if not module.endswith("__main__"):
            __import__(module)  # which makes it an attribute of its package, if it was not imported before
    assert callable(fl.lstsq)
    assert callable(fl.gauss_newton)
    assert callable(fl.variable_projection)
    assert [name for name in fl.__all__ if isinstance(getattr(fl, name), types.ModuleType)] == ["distributed", "plot"]


@at_each_file
def test_no_file_is_too_long_to_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_each_folder_says_what_is_in_it():
    for folder in filter(None, FLOORS):
        told = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        missing = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        missing = {name for name in missing if name not in told}
        assert not missing, f"{folder}/__init__.py does not tell of {sorted(missing)}"
