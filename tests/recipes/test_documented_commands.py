"""Every command that README, docs and recipes write down is one that the programs take, flags and all; none is run."""

import re
import shlex

import dpo
import extend_sft
import grpo
import kto
import pytest
import sft
import typer

from llm_dynamics import cli
from tests.recipes.conftest import RECIPES, ROOT

PARSERS = {
    "sft": sft.make_parser, "extend_sft": extend_sft.make_parser, "dpo": dpo.make_parser,
    "kto": kto.make_parser, "grpo": grpo.make_parser,
}  # fmt: skip
PLACES = [ROOT / "README.md", RECIPES / "README.md", *(ROOT / "docs").glob("*.md"), *RECIPES.glob("*.py")]
COMMAND = re.compile(r"\s*(?:python|accelerate|llm-dynamics) ")


def commands_in(path):
    """The commands of a page's shell blocks, or of a script's head, each on one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S)
        text = "\n".join(code for kind, code in blocks if kind in ("", "bash", "sh"))
    else:
        text = text.split('"""')[1]
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if COMMAND.match(line)]


COMMANDS = sorted({command for path in PLACES for command in commands_in(path)})


def test_commands_are_found_everywhere():
    assert len(COMMANDS) >= 30
    for program in (*(f"recipes/{name}.py" for name in PARSERS), "llm-dynamics report", "llm-dynamics probes build"):
        assert any(program in command for command in COMMANDS), program


@pytest.mark.parametrize("command", [command for command in COMMANDS if "recipes/" in command.split("llm-dynamics")[0]])
def test_a_recipe_takes_the_flags_that_are_written_down(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    place = next(number for number, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
    name = words[place].removeprefix("recipes/").removesuffix(".py")
    flags = [*words[place + 1 :], "--bf16", "false", "--use_cpu", "true"]  # those of a machine that this may not be
    *_, keys, unknown = PARSERS[name]().parse_args_and_config(
        flags, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert (keys, unknown) == ([], [])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("llm-dynamics ")])
def test_the_command_line_takes_the_options_that_are_written_down(command):
    words = shlex.split(command, comments=True)[1:]
    program = typer.main.get_command(cli.app)
    while hasattr(program, "commands"):
        program = program.commands[words.pop(0)]
    program.make_context(program.name, words)  # parsed and checked, not run
