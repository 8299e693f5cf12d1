"""The direction of imports, as architecture.md states it: read from the source, so that nothing needs to be loaded."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import llm_dynamics

ROOT = Path(llm_dynamics.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TOUCHPOINTS = "_trl.py"
# What a part may import of this package, besides itself.
ALLOWED = {
    "probes": {"files", "options", "likelihood"},
    "likelihood": set(),
    "kernel": {"likelihood"},
    "runlog": {"files"},
    "rollouts": {"likelihood"},
    "influence": {"likelihood", "kernel"},
    "frames": {"runlog"},
    "rules": {"frames"},
    "report": {"files", "runlog", "frames", "rules"},
    "callbacks": {
        "files",
        "_trl",
        "options",
        "probes",
        "likelihood",
        "kernel",
        "influence",
        "rollouts",
        "runlog",
        "frames",
        "rules",
        "report",
    },
    "cli": {"probes", "likelihood", "kernel", "frames", "rules", "report", "runlog", "posthoc", "demo"},
    "posthoc": {"probes", "likelihood", "kernel", "runlog", "callbacks"},
    "trainers": {
        "_trl",
        "options",
        "probes",
        "likelihood",
        "kernel",
        "influence",
        "rollouts",
        "runlog",
        "report",
        "callbacks",
    },
    "_trl": set(),
    "data": set(),
    "options": set(),
    "files": set(),
}
MODEL_LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}
PRIVATE_MODULES = {"transformers.trainer", "transformers.modeling_utils", "peft.tuners.tuners_utils"}
PRIVATE_NAMES = {"_metrics", "fused_lm_head", "add_fused_lm_head", "use_adapter", "ref_model"}


def name_of(file):
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(file):
    """Every absolute module name that a file imports, at any depth; `from a import b` counts as `a` and as `a.b`."""
    package = ["llm_dynamics", *file.relative_to(ROOT).parts[:-1]]
    names = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def parts_imported(file):
    """The parts of this package that a file imports: folder or module directly below `llm_dynamics`."""
    known = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    split = [name.split(".") for name in imported(file)]
    return {names[1] for names in split if names[0] == "llm_dynamics" and len(names) > 1 and names[1] in known}


def docstrings(tree):
    """Ids of the nodes that are docstrings."""
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, scopes)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def names_used(file):
    """Identifiers, attributes, keyword arguments and texts of a file, docstrings excepted."""
    tree = tree_of(file)
    prose = docstrings(tree)
    nodes = list(ast.walk(tree))
    return (
        {node.id for node in nodes if isinstance(node, ast.Name)}
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        | {node.arg for node in nodes if isinstance(node, ast.keyword)}
        | {node.name for node in nodes if isinstance(node, ast.alias)}
        | {node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in prose}
    )


@pytest.mark.parametrize("file", [file for file in FILES if file.parent != ROOT], ids=name_of)
def test_imports_go_in_the_direction_of_the_architecture(file):
    part = file.relative_to(ROOT).parts[0]
    if part == "demo":
        return
    assert part in ALLOWED, f"{part}/ is not in this test's list: say in ALLOWED what it may import (architecture.md)"
    backwards = parts_imported(file) - ALLOWED[part] - {part}
    assert not backwards, f"{name_of(file)} imports {sorted(backwards)}; {part} may import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("part", ["probes", "likelihood", "kernel", "runlog", "frames", "rules", "report"])
def test_the_parts_below_trainers_load_no_trainer_class(part):
    for file in (ROOT / part).rglob("*.py"):
        trainers = {name for name in imported(file) if name.split(".")[0] in ("trl", "transformers")}
        trainers = {name for name in trainers if name.endswith(("Trainer", "TrainerCallback", "TrainingArguments"))}
        assert not trainers, f"{name_of(file)} imports {sorted(trainers)}"


@pytest.mark.parametrize("part", ["runlog", "frames", "rules", "report"])
def test_what_reads_a_log_loads_no_model(part):
    for file in (ROOT / part).rglob("*.py"):
        loaded = {name.split(".")[0] for name in imported(file)}
        assert not loaded & MODEL_LIBRARIES, name_of(file)


def test_reading_and_judging_a_log_loads_neither_torch_nor_trl():
    script = """
import sys
import llm_dynamics.frames, llm_dynamics.report, llm_dynamics.runlog
from llm_dynamics import Verdict, judge
from llm_dynamics.rules import is_squeezing
print(sorted({"torch", "transformers", "trl", "peft", "accelerate", "datasets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_lazy_face_names_what_type_checkers_see():
    face = llm_dynamics
    assert all(hasattr(face, name) for name in face.__all__)
    assert dir(face) == face.__all__
    tree = tree_of(ROOT / "__init__.py")
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(face.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


def test_the_touchpoints_are_imported_by_callbacks_and_trainers_alone():
    importers = {file.relative_to(ROOT).parts[0] for file in FILES if "_trl" in parts_imported(file)}
    assert importers, "nothing imports _trl: this test has lost its object"
    assert importers <= {"callbacks", "trainers"}


@pytest.mark.parametrize("file", [file for file in FILES if file.name != TOUCHPOINTS], ids=name_of)
def test_private_names_of_trl_and_transformers_appear_in_the_touchpoints_only(file):
    modules = {name for name in imported(file) if name in PRIVATE_MODULES or name.startswith("trl.trainer.")}
    assert not modules, f"{name_of(file)} imports {sorted(modules)}; move it to {TOUCHPOINTS}"
    names = PRIVATE_NAMES & names_used(file)
    assert not names, f"{name_of(file)} uses {sorted(names)}; move it to {TOUCHPOINTS}"


def test_the_search_finds_what_it_looks_for():
    assert "trl.trainer.utils" in imported(ROOT / TOUCHPOINTS)
    assert {"_metrics", "use_adapter", "ref_model"} <= names_used(ROOT / TOUCHPOINTS)
    assert {"probes", "likelihood", "runlog", "_trl"} <= parts_imported(ROOT / "callbacks" / "probe.py")


def test_the_public_face_exports_what_it_names():
    assert all(hasattr(llm_dynamics, name) for name in llm_dynamics.__all__)
    assert {"ProbeSet", "watch", "load_run", "load_runs"} <= set(llm_dynamics.__all__)
