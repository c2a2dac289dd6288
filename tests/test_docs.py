"""The docs say what is there: every option stands on its command's page, and every link leads somewhere."""

import importlib
import re
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]


def commands_of(group: click.Group) -> list[click.Command]:
    """A group's commands, those that another package brings among them."""
    context = click.Context(group)
    return [command for name in group.list_commands(context) if (command := group.get_command(context, name))]


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "storage" / "FORMAT.md"])
COMMANDS = [
    (program, command)
    for program, module in (
        ("teacherdump", "teacherdump.cli"),
        ("studenttrain", "studenttrain.cli"),
        ("logitstore", "storage.cli"),
    )
    for command in commands_of(importlib.import_module(module).main)
]


@pytest.mark.parametrize(
    ("program", "command"), COMMANDS, ids=[f"{program}-{command.name}" for program, command in COMMANDS]
)
def test_every_option_stands_on_the_page_of_its_command(program: str, command: click.Command) -> None:
    text = (ROOT / "docs" / f"{program}-{command.name}.md").read_text()
    if command.name == "plan":  # takes what `run` takes, and says so
        text += (ROOT / "docs" / "teacherdump-run.md").read_text()
    options = {
        max(option.opts, key=len) for option in command.params if isinstance(option, click.Option) and not option.hidden
    }
    missing = sorted(option for option in options - {"--help"} if not re.search(rf"{option}(?![\w-])", text))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_the_readme_says_in_its_first_lines_what_it_is_for() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line][1:3]
    assert "teacher" in " ".join(lines)
    assert "soft targets" in " ".join(lines)
