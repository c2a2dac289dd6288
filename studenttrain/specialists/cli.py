"""`studenttrain specialists`: which classes a generalist confuses, specialists for them, and all of them as one."""

import click


@click.group("specialists", context_settings={"help_option_names": ["-h", "--help"]})
def specialists_group() -> None:
    """Specialists for the classes that a generalist confuses, from the targets that it stored."""
