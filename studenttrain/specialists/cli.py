"""`studenttrain specialists`: which classes a generalist confuses, specialists for them, and all of them as one."""

import click

from studenttrain.specialists.eval_cli import eval_command
from studenttrain.specialists.fit_cli import fit_command
from studenttrain.specialists.fuse_cli import fuse_command
from studenttrain.specialists.plan_cli import plan_command


@click.group("specialists", context_settings={"help_option_names": ["-h", "--help"]})
def specialists_group() -> None:
    """Specialists for the classes that a generalist confuses, from the targets that it stored."""


specialists_group.add_command(eval_command)
specialists_group.add_command(fit_command)
specialists_group.add_command(fuse_command)
specialists_group.add_command(plan_command)
