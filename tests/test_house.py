"""The shape of the code: which way imports go, and how much there is to read."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPO = ROOT / "spo"
FILES = sorted(SPO.rglob("*.py"))
TREES = {path.relative_to(SPO).as_posix(): ast.parse(path.read_text()) for path in FILES}

INNER = ("method", "models", "scorers", "data")  # know nothing of
OUTER = ("run", "launch", "publish", "evaluation", "costs", "guard", "tiny_world")
# file -> outer module -> why it may be imported there
EXCEPTIONS = {
    "method/build.py": {
        "spo.run.tracking": "the recipe holds the settings of the tracker",
        "spo.run.validation": "the recipe holds the settings of the validation images",
    },
    "method/checkpoint.py": {
        "spo.launch.batch_plan": "pairs are dealt out again by the plan",
        "spo.run.checkpoint_folder": "folders of all checkpoints are written and read alike",
    },
    "method/collect.py": {"spo.launch.batch_plan": "prompts are cut into slices by the plan"},
    "method/preflight.py": {
        "spo.guard.judges": "the judges are named and looked for before models load",
        "spo.launch.batch_plan": "sizes must fit the number of processes",
        "spo.publish.push": "access to the Hub is checked before models load",
        "spo.run.checkpoint_folder": "a checkpoint's config is compared with the run's",
        "spo.run.folder": "the name of the run directory",
        "spo.run.resume": "the checkpoint to resume from is found before models load",
    },
    "method/start.py": {
        "spo.guard.evaluations": "those of a run that left no checkpoint are made again",
        "spo.guard.judges": "the judges load after the scorer",
        "spo.guard.watch": "what looks at the run between its epochs",
        "spo.launch.workers": "the processes of the run",
        "spo.run.session": "the run directory and what is recorded there",
    },
    "method/trainer.py": {
        "spo.guard.watch": "the loop looks at the run between epochs",
        "spo.launch.workers": "the loop runs on every process",
        "spo.run.checkpoint_folder": "the checkpoint of the best epoch is kept",
        "spo.run.folder": "the last lines name the run's files",
        "spo.run.session": "the loop lives in a session",
    },
}


def imported(tree):
    """Returns the names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would hide from this test"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def outer_imports(tree):
    """Returns the modules of outer packages that a file imports."""
    found = {name for name in imported(tree) if is_module(name)}
    inside = {name for name in found if name.split(".")[:1] == ["spo"] and name.count(".") >= 1}
    outer = {name for name in inside if name.split(".")[1] in OUTER}
    return {name for name in outer if not any(other.startswith(f"{name}.") for other in outer)}


def test_imports_go_one_way():
    found = {
        file: imports
        for file, tree in TREES.items()
        if file.split("/")[0] in INNER and (imports := outer_imports(tree))
    }
    # Both ways: an exception that is not needed any more must leave the list.
    assert found == {file: set(reasons) for file, reasons in EXCEPTIONS.items()}
    assert all(reason for reasons in EXCEPTIONS.values() for reason in reasons.values())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import spo.run.folder", {"spo.run.folder"}),
        ("from spo.costs import meter", {"spo.costs.meter"}),
        ("from spo import launch", {"spo.launch"}),
        ("def f():\n    from spo.launch.workers import Workers", {"spo.launch.workers"}),
        ("if x:\n    import spo.tiny_world.clip as clip", {"spo.tiny_world.clip"}),
        ("from spo.models.lora import Lora\nimport os", set()),
    ],
)
def test_imports_are_found_wherever_they_hide(source, expected):
    assert outer_imports(ast.parse(source)) == expected


def test_few_files_beside_the_folders():
    files = [path.name for path in SPO.iterdir() if path.is_file()]
    assert len(files) <= 8, files


def too_long(lengths, limit):
    return {name: length for name, length in lengths.items() if length > limit}


def functions():
    """Returns all functions and methods, by file and line."""
    return {
        f"{file}:{node.lineno} {node.name}": node
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_no_file_is_over_260_lines():
    lengths = {str(path.relative_to(SPO)): len(path.read_text().splitlines()) for path in FILES}
    assert too_long(lengths, 260) == {}


def test_no_function_is_over_45_lines():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions().items()}
    assert too_long(lengths, 45) == {}


def test_few_functions_take_a_config():
    def takes_config(node):
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        annotations = [ast.unparse(a.annotation) for a in arguments if a.annotation]
        return any(re.search(r"\bConfigDict\b", annotation) for annotation in annotations)

    found = [name for name, node in functions().items() if takes_config(node)]
    assert 0 < len(found) <= 15, found


def test_docstrings_are_sentences():
    begins = re.compile(r"(What|How|Those|Which|Where|Whether|That)\b")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{file} {getattr(node, 'name', '')}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and begins.match(ast.get_docstring(node) or "")
    ]
    assert len(found) <= 20, found


_LOADED = """
import sys
import spo.method.trainer
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None) or "")
"""


def test_the_trainer_loads_few_lines():
    result = subprocess.run(
        [sys.executable, "-c", _LOADED],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {Path(line) for line in result.stdout.splitlines() if line} & set(FILES)
    lines = {str(path.relative_to(SPO)): len(path.read_text().splitlines()) for path in loaded}
    assert "method/trainer.py" in lines
    assert sum(lines.values()) <= 4500, (sum(lines.values()), lines)
