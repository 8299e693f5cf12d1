"""Write one self-contained HTML page about one or several runs.

The page needs no network: style, script, data and plotly.js lie in it, and its content security policy forbids it to
load anything. Prompts and responses are untrusted: HTML is escaped by jinja2's autoescape, JSON by
`text.json_for_script`, labels that plotly reads by `text.for_plotly`; and only the two scripts of the page, named
by their hashes, may run at all.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from llm_dynamics.files import write_whole
from llm_dynamics.report import content
from llm_dynamics.report.figures import PANELS
from llm_dynamics.report.glance import glance
from llm_dynamics.report.normal import normal_view
from llm_dynamics.report.rollouts import rollout_views
from llm_dynamics.report.text import json_for_script, nats, percent
from llm_dynamics.report.token_section import token_section
from llm_dynamics.report.why import why_section
from llm_dynamics.runlog import RunLog, RunLogs


def write_report(runs: RunLogs | RunLog, path: str | Path, *, title: str = "What moved in training") -> Path:
    """Write the report of `runs` to `path`.

    Args:
        runs: One run, or several by name: they are shown side by side.
        path: The HTML file to write; its folder is made.
        title: Heading of the page.

    Returns:
        The path of the file.

    Raises:
        RunLogError: Where a log is damaged.
        ValueError: Where a folder, or a file that is no page, has this name; a page that is there is replaced whole.

    Example:
        >>> write_report(load_runs({"sft": "runs/sft", "dpo": "runs/dpo"}), "report.html")  # doctest: +SKIP
    """
    path = Path(path)
    _refuse_other_file(path)
    if isinstance(runs, RunLog):
        runs = RunLogs({runs.name: runs})
    tokens = token_section(runs)
    why, why_data = why_section(runs)
    rollouts, curves = rollout_views(runs) or (None, None)
    # a page without accounts or rollouts carries nothing for them
    parts = ["page", *(["why", "influence_map"] if why_data else []), *(["rollouts"] if rollouts else [])]
    data = content.script_data(runs) | {"why": why_data}
    script = "\n".join(_asset(f"{part}.js") for part in (*parts, "unpack", "tokens", "finder", "drawn"))
    views = [content.run_view(name, run) for name, run in runs.runs.items()]
    verdicts = [normal_view(name, run) for name, run in runs.runs.items()]
    accounts = {account["name"]: account for account in why["runs"]}
    # Markup marks what is not to be escaped again: files of this package, plotly.js, JSON made safe for a script and
    # base64.
    page = _template().render(
        title=title,
        policy=_policy(get_plotlyjs(), script),
        style=Markup("\n".join(_asset(f"{part}.css") for part in (parts[0], "glance", "normal", *parts[1:], "tokens"))),
        plotly=Markup(get_plotlyjs()),
        script=Markup(script),
        data=Markup(json_for_script(data | ({"rollouts": curves} if rollouts else {}))),
        runs=views,
        glances=[glance(*both, accounts.get(both[0]["name"])) for both in zip(views, verdicts, strict=True)],
        legend=content.legend(runs),
        normal=verdicts,
        why=why,
        rollouts=rollouts,
        panels=PANELS,
        tokens=tokens.view,
        token_data=Markup(tokens.data),
        version=_version(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode(errors="backslashreplace"))  # a lone surrogate is shown as its escape
    return path


def _refuse_other_file(path: Path) -> None:
    """Refuse to write over a file that is no page: a part of a log, a probe set, a checkpoint.

    Raises:
        ValueError: Where a folder or such a file is there.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the HTML file to write, such as {path / 'report.html'}")
    if path.is_file():
        with path.open("rb") as stream:
            begins = stream.read(64)
        if begins.strip() and not begins.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise ValueError(f"{path} is there and no HTML page: it is not written over; give another name")


def _policy(*scripts: str) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


@cache
def _asset(name: str) -> str:
    return files("llm_dynamics.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["nats"] = nats
    environment.filters["percent"] = percent
    return environment.get_template("page.html.j2")


def _version() -> str:
    try:
        return version("llm-dynamics")
    except PackageNotFoundError:
        return "unknown version"
