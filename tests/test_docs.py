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


def leaves_of(group: click.Group, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command under a group, with the words that call it; groups in the group among them."""
    found = []
    for command in commands_of(group):
        called = (*words, str(command.name))
        found += leaves_of(command, called) if isinstance(command, click.Group) else [(called, command)]
    return found


def page_of(words: tuple[str, ...]) -> str:
    """The page of a command; of one in a group its section `## plan` of the group's page."""
    text = (ROOT / "docs" / f"{words[0]}-{words[1]}.md").read_text()
    if len(words) == 2:
        return text
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    return next((section for section in sections if section.startswith(f"{words[2]}\n")), "")


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "storage" / "FORMAT.md"])
COMMANDS = [
    leaf
    for program, module in (
        ("teacherdump", "teacherdump.cli"),
        ("studenttrain", "studenttrain.cli"),
        ("logitstore", "storage.cli"),
    )
    for leaf in leaves_of(importlib.import_module(module).main, (program,))
]


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=["-".join(words) for words, _ in COMMANDS])
def test_every_option_stands_on_the_page_of_its_command(words: tuple[str, ...], command: click.Command) -> None:
    text = page_of(words)
    if words == ("teacherdump", "plan"):  # takes what `run` takes, and says so
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
