"""One direction of imports: a room imports only rooms before it, and no two files import each other in a circle."""

import ast
from pathlib import Path

import rrepa_lab
from rrepa_lab.paths import bundled

PACKAGE = Path(rrepa_lab.__file__).parent
# the order of rrepa_lab/README.md; a file of the package itself is a room of its own
ORDER = (
    "errors", "signals", "progress", "checks", "values", "files", "config", "readers", "registry", "paths", "processes",
    "hardware",
    "data", "flow", "align", "space", "runs", "training", "measurements", "sampling", "analysis", "evaluation",
    "viz", "batch", "studies", "bench", "cli",
)  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


PAGE_ORDER = ("server", "page", "tabs", "demo", "screenshots")  # of app/README.md
APP = bundled("app")

MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py") if not {"assets", "app"} & {*path.parts}}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also within functions; those for type checkers alone count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rrepa_lab":
            assert node.level == 0, f"{path}: relative import"
            base = node.module.removeprefix("rrepa_lab").removeprefix(".")
            found |= {name if (name := f"{base}.{alias.name}".strip(".")) in MODULES else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("rrepa_lab.") for alias in node.names if alias.name.startswith("rrepa_lab.")}
    return found - {""}  # __init__ holds the version and the public names


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def climbing() -> list[str]:
    """Imports against the order, "file imports module"."""
    return [
        f"{module} imports {other}"
        for module, path in sorted(MODULES.items())
        for other in sorted(imports(path))
        if module and room(other) != room(module) and ORDER.index(room(other)) > ORDER.index(room(module))
    ]


def test_every_room_has_a_place_in_the_order() -> None:
    assert {room(module) for module in MODULES if module} == {*ORDER}


def test_no_import_climbs() -> None:
    assert climbing() == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: imports(path) & {*MODULES} for module, path in MODULES.items() if module}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def page_imports() -> dict[str, set[str]]:
    """File of the page -> the modules of the page that it imports."""
    files = {
        ".".join(path.relative_to(APP).with_suffix("").parts).removesuffix(".__init__"): path for path in APP.rglob("*.py")
    }
    found = {}
    for module, path in files.items():
        nodes = [*ast.walk(ast.parse(path.read_text("utf-8")))]
        names = {f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found[module] = {other for other in files if any(f"{name}.".startswith(f"{other}.") for name in names)}
    return found


def test_no_import_of_the_page_climbs() -> None:
    graph = page_imports()
    assert {room(module) for module in graph} == {*PAGE_ORDER}
    climbing = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if PAGE_ORDER.index(room(other)) > PAGE_ORDER.index(room(module))
    ]
    assert climbing == []
    assert "server.runs" in graph["tabs.samples"], "the imports of a tab are found"
    assert "tabs" in graph["demo"]


def test_no_tab_imports_another() -> None:
    for module, others in page_imports().items():
        folder = ".".join(module.split(".")[:2])
        shared = {"tabs", "tabs.trajectories"}
        if module.startswith("tabs."):
            assert {one for one in others if one.startswith("tabs")} - shared <= {
                one for one in others if one.startswith(folder)
            }


def test_the_test_finds_a_climbing_import(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text("def f():\n    from rrepa_lab.cli import main\n    from rrepa_lab import cli\n", "utf-8")
    assert imports(file) == {"cli"}


def test_the_developers_readme_has_the_same_order() -> None:
    rooms, _, _ = (PACKAGE / "README.md").read_text("utf-8").partition("## A batch")
    rows = [line.split("|")[1] for line in rooms.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in row.replace("`", " ").replace(",", " ").split()]
    assert [name for name in named if name in ORDER] == [*ORDER]
