"""`logitstore`: look at a store, check it, finalize it, pack it another way."""

import contextlib
import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from storage.combine_cli import combine_command
from storage.console import Pass, command_errors, format_bytes, format_count, format_plural, printable, progress
from storage.copy_cli import copy_command
from storage.diff_cli import diff_command
from storage.errors import StoreError

if TYPE_CHECKING:
    from storage.scan import VerifyResult

COMMANDS = "logitstore.commands"  # group of entry points: commands that other packages bring
SHOWN_DAMAGE = 20

STORE = click.argument("store")  # a path or a URL
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
THREADS = click.option("--threads", type=click.IntRange(1), help="Threads; by default one for each core.")


class WithCommands(click.Group):
    """A group whose own commands are joined by those that other packages registered, loaded when they are asked for.

    A package registers one as an entry point of `logitstore.commands`. One that can't be imported is not there.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in order."""
        found = {point.name for point in entry_points(group=COMMANDS)}
        return sorted({*super().list_commands(ctx), *(name for name in found if self.get_command(ctx, name))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; the group's own come first."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for point in entry_points(group=COMMANDS, name=cmd_name):
            with contextlib.suppress(ImportError):
                command = point.load()
                return command if isinstance(command, click.Command) else None
        return None


@click.group(cls=WithCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitstore", prog_name="logitstore")
def main() -> None:
    """Look at a store of soft targets, check it, finalize it, convert it, copy it."""


main.add_command(combine_command)
main.add_command(copy_command)
main.add_command(diff_command)


@main.command()
@STORE
@JSON
@click.option("--quarantine", "with_quarantine", is_flag=True, help="List the rows without targets: row, key, reason.")
def info(store: str, as_json: bool, with_quarantine: bool) -> None:
    """Say what a store is."""
    with command_errors():
        from storage.info import info as describe
        from storage.info import info_text, quarantine, quarantine_text

        figures = describe(store)
        entries = quarantine(store) if with_quarantine else []
        if as_json:
            click.echo(_json(figures | ({"quarantine": entries} if with_quarantine else {})))
            return
        click.echo(printable(info_text(figures)))
        if with_quarantine:
            click.echo(printable(quarantine_text(entries)))


@main.command()
@STORE
@JSON
@THREADS
def verify(store: str, as_json: bool, threads: int | None) -> None:
    """Check every record, object, chunk and row of a store; exit 1 where something is damaged."""
    with command_errors():
        from storage.scan import verify as check

        with _rows_pass(store, "checking") as bar:
            result = check(store, num_workers=threads, progress=bar.advance)
        click.echo(_json(result.to_json()) if as_json else printable(_verify_text(result)))
        if not result.ok:
            raise SystemExit(1)


@main.command()
@STORE
@JSON
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the figures: a path that ends in .png or .html.")
@THREADS
def stats(store: str, as_json: bool, picture: Path | None, threads: int | None) -> None:
    """Count what a store says: top-1 classes, entropy, kept mass, refused rows, bytes."""
    with command_errors():
        from storage.scan import check_picture_path, write_picture
        from storage.scan import stats as count
        from storage.stats_text import stats_text

        if picture is not None:
            check_picture_path(picture)
        with _rows_pass(store, "counting") as bar:
            figures = count(store, num_workers=threads, progress=bar.advance)
        if picture is not None:
            write_picture(figures, picture)
            click.echo(f"picture: {picture}", err=True)
        click.echo(_json(figures.to_json()) if as_json else printable(stats_text(figures)))


@main.command()
@STORE
@click.option("--partial", is_flag=True, help="Finalize at what is sealed, though rows are missing.")
def finalize(store: str, partial: bool) -> None:
    """Check the sealed shards once more, then make a store read-only for good."""
    with command_errors():
        from storage.exclusive import sole_run
        from storage.reader import open_one_store
        from storage.writer import StoreWriter

        with open_one_store(store) as there:
            manifest, was_final, num_rows = there.manifest, there.finalized, there.num_sealed_rows
        with (
            sole_run(store),
            StoreWriter.open(store, manifest) as writer,
            progress(num_rows, "rows", "checking", quiet=was_final) as bar,
        ):
            digest = writer.finalize(partial=partial, progress=bar.advance)
            missing = manifest.num_rows - writer.store.num_sealed_rows
        said = "was finalized already" if was_final else "finalized"
        left_out = f" ({format_count(missing)} rows are missing for good)" if missing else ""
        click.echo(f"{store}: {said}: {format_count(num_rows)} rows{left_out}\ncontent digest {digest}")


@main.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--compressor",
    type=click.Choice(["none", "zstd", "zstd-max"]),
    help="Of the new store; by default as it was. zstd-max: the smallest, and very slow to write.",
)
@THREADS
def convert(source: str, target: str, compressor: Any, threads: int | None) -> None:
    """Copy a finalized store to TARGET: Zarr, or HDF5 where it ends in .h5. Run again, it goes on where it stopped."""
    with command_errors(is_resumed=True):
        from storage.scan import convert as copy

        with _rows_pass(source, "converting", times=2) as bar:
            result = copy(source, target, compressor, num_workers=threads, progress=bar.advance)
        click.echo(
            f"{result.path}: {format_count(result.num_rows)} rows, {format_bytes(result.num_bytes)} "
            f"({format_bytes(result.source_bytes)} before)\ncontent digest {result.content_digest}, as {source} has it"
        )


@contextlib.contextmanager
def _rows_pass(path: str, label: str, times: int = 1) -> Iterator[Pass]:
    """A progress bar over a store's sealed rows."""
    from storage.reader import open_store

    total: int | None = None
    with contextlib.suppress(StoreError), open_store(path) as store:  # what is wrong with it, the pass itself says
        total = store.num_sealed_rows * times
    with progress(total, "rows", label) as bar:
        yield bar


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False)


def _verify_text(result: "VerifyResult") -> str:
    lines = [f"note: {text}" for text in result.notes] + [f"warning: {text}" for text in result.warnings]
    lines += [f"damaged: {damage.message}" for damage in result.damage[:SHOWN_DAMAGE]]
    if len(result.damage) > SHOWN_DAMAGE:
        lines.append(f"... and {format_count(len(result.damage) - SHOWN_DAMAGE)} more: --json gives all")
    missing = [f"{start} to {stop - 1}" for start, stop in result.missing_rows]
    if missing:
        more = f" and {len(missing) - 5} more ranges" if len(missing) > 5 else ""
        lines.append(f"rows not sealed: {', '.join(missing[:5])}{more}")
    if result.num_rows is not None:
        lines.append(
            f"{result.path}: checked {format_count(result.num_sealed_rows)} of {format_count(result.num_rows)} rows, "
            f"{format_plural(result.num_shards, 'shard')}, {format_plural(result.num_chunks, 'chunk')}"
        )
    if result.ok and result.content_digest is not None:
        lines.append(f"content digest {result.content_digest}")
    lines.append("nothing is damaged" if result.ok else f"{format_count(len(result.damage))} found damaged")
    return "\n".join(lines)
