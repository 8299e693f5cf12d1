"""The run logs that a figure is made of, as its command line names them: one log per seed under each name.

`name=folder` gives a run a name; the folder may hold wildcards (`'sft=runs/study/seed*/sft'`), and several folders
under one name are seeds of it. A folder alone gives all runs in it that the figure knows, as `folder/sft` or
`folder/seed0/sft`, `folder/seed1/sft`, ...
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path

from llm_dynamics import load_run
from llm_dynamics.runlog import RunLog

Seeds = list[RunLog]
"""The logs of one run, a seed each."""
DEFAULT_OUT = Path("runs/figures")
HELP = (
    "name=folder: a trainer's output_dir (quote wildcards; several folders of one name are seeds, which are averaged); "
    "or a folder that holds the runs, as folder/NAME or folder/seed*/NAME"
)


def log_arguments(text: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with `--out`, its help being the whole docstring of the script.

    Args:
        text: The docstring.
        name: File name of the figure, without a suffix.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT / name, help=f"path without a suffix ({DEFAULT_OUT / name})"
    )
    return parser


def open_runs(given: Sequence[str], *, known: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Seeds]:
    """Open the run logs that `--runs` names.

    Args:
        given: Its values, `name=folder` or `folder`.
        known: Names of runs that the figure can show.
        needed: Those that it cannot do without.

    Returns:
        The logs by name, in the order of `known`.

    Raises:
        ValueError: For a folder without a run log or without any known run, a name that is not known, a run given twice
            or a needed one missing.
    """
    folders: dict[str, list[Path]] = {name: [] for name in known}
    for value in given:
        for name, folder in _folders(value, known):
            if name not in folders:
                raise ValueError(f"no run is called {name!r} here (seen in {value!r}); allowed: {', '.join(known)}")
            if folder.resolve() in (other.resolve() for other in folders[name]):
                raise ValueError(f"{folder} is given twice as {name!r}: seeds must be runs of their own")
            folders[name].append(folder)
    missing = [name for name in needed if not folders[name]]
    if missing:
        found = ", ".join(name for name in known if folders[name]) or "none"
        raise ValueError(
            f"this figure needs the runs {', '.join(needed)}; missing: {', '.join(missing)}; found: {found}. Name "
            f"what is missing: --runs {' '.join(f'{name}=FOLDER' for name in missing)} ..."
        )
    return {name: [load_run(folder) for folder in some] for name, some in folders.items() if some}


def _folders(value: str, known: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the runs that one value of `--runs` names, as (name, folder)."""
    name, named, path = value.partition("=")
    if not named or Path(value).exists():  # a folder may be called `lr=1e-4`
        return _runs_in(Path(value), known)
    if not has_magic(path):
        return [(name, Path(path))]
    found = sorted(glob(path))
    if not found:
        raise ValueError(f"no folder matches {path!r} (of {value!r}) below {Path.cwd()}")
    return [(name, Path(folder)) for folder in found]


def _runs_in(folder: Path, known: Sequence[str]) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; --runs takes {HELP}")
    for parent in ([folder], sorted(folder.glob("seed*"))):
        found = [(name, one / name) for name in known for one in parent if _holds_log(one / name)]
        if found:
            return found
    if _holds_log(folder):
        return [(folder.resolve().name, folder)]
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise ValueError(
        f"{folder} holds no run called {', '.join(known)}, neither itself nor in folders seed*; seen there: {inside}. "
        "If it is called otherwise, give it its name: --runs NAME=FOLDER"
    )


def _holds_log(folder: Path) -> bool:
    return any((place / "meta.json").is_file() for place in (folder, folder / "dynamics"))


def say_seeds(runs: Mapping[str, Seeds]) -> str:
    """Return how many seeds each run has, in words."""
    return ", ".join(f"{name}: {len(logs)} seed{'s' if len(logs) > 1 else ''}" for name, logs in runs.items())
