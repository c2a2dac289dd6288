"""`studenttrain specialists plan`: which classes a generalist confuses."""

import json
from typing import Any

import click

from storage.console import command_errors, printable, progress


@click.command("plan")
@click.option("--targets", required=True, help="Store of the generalist's soft targets, a series, or a URL.")
@click.option("--num-specialists", type=int, required=True, help="Clusters of classes to look for.")
@click.option("--out", required=True, help="Where the plan goes, such as plan.json.")
@click.option(
    "--classes-each", type=int, help="Classes of each, those nearest to its centre; they overlap.  [its cluster's]"
)
@click.option("--min-classes", type=int, help="Smaller clusters are no specialists.  [2]")
@click.option("--on", help="Whose columns are clustered: correlation or covariance.  [correlation]")
@click.option("--seed", type=int, help="Of the starts of k-means.  [0]")
@click.option("--picture", help="Draw the classes in the plan's order: a .png.")
@click.option("--force", is_flag=True, help="Replace another plan that is there.")
@click.option("--threads", type=click.IntRange(1), help="Threads that read.  [one a core, at most 8]")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no notes.")
def plan_command(
    targets: str,
    out: str,
    picture: str | None,
    force: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Find classes that the generalist confuses, and write which specialist shall have which."""
    with command_errors():
        from storage.reader import open_store
        from studenttrain.specialists.clusters import ClusterOptions
        from studenttrain.specialists.plan_picture import check_plan_picture, write_plan_picture
        from studenttrain.specialists.planning import plan_from_store, planned_text

        options = ClusterOptions(**{name: value for name, value in given.items() if value is not None})
        if picture is not None:
            check_plan_picture(picture)
        with open_store(targets) as store:
            num_rows = store.num_sealed_rows
        with progress(num_rows, "rows", "reading", quiet=quiet) as bar:
            made, is_written = plan_from_store(
                targets, out, options, force=force, num_workers=threads, progress=bar.advance
            )
        for note in () if quiet else made.notes:
            click.echo(printable(f"note: {note}"), err=True)
        if picture is not None:
            write_plan_picture(picture, made.plan, made.covariance.covariance_CC)
        if as_json:
            value = {"path": out, "uncovered": list(made.plan.uncovered)} | made.plan.to_json()
            click.echo(json.dumps(value, indent=2))
        else:
            click.echo(printable(planned_text(out, made, is_written=is_written)))
