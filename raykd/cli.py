"""The command line. Nothing heavy is imported until a verb is carried out."""

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click

from raykd import __version__
from raykd.console import open_aside, show, silence, stdout_for_results, tell
from raykd.errors import RaykdError
from raykd.files import stopping
from raykd.store.commands import store

EXITS = (
    "Exit codes: 0 ok, 2 usage or recipe, 3 data or store, 4 quality gate, 5 infrastructure, "
    "130/143 signals."
)
HERE = Path(__file__).parent
OPTIONS = {"sets": "--set", "allow_import": "--allow-import"}  # those not named as they are typed


@click.group(
    epilog=EXITS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
def cli() -> None:
    """Distil a large PyTorch teacher into a small student.

    \b
        raykd run examples/gesture/recipe.toml --smoke
    """


def main(*verb: str) -> None:
    """Run the `raykd` script, or one verb of it.

    A mistake of whatever kind ends in one message and its exit code.
    """
    _open_closed_streams()
    stopping.watch()
    code = _carried_out([*verb, *sys.argv[1:]])
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    _end(code)


def _carried_out(words: list[str]) -> int:
    """The exit code of a command line, whose messages are printed."""
    try:
        cli.main(words, standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt, SystemExit) as error:
        return _exit_code(error)
    except click.ClickException as error:
        tell(_usage(error))
        return 2
    except RaykdError as error:
        tell(f"raykd: {error}")
        return error.exit_code
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except Exception as error:
        return _unforeseen(error)
    except BaseException as error:  # no error of Python's or of a library
        return _exit_code(error)
    return 0


def _exit_code(error: BaseException) -> int:
    """The exit code after an exit that a signal, a closed pipe or the user's own code caused."""
    if isinstance(error.__context__, BrokenPipeError):
        silence(sys.stdout)
        return 0
    if stopping.has_been_asked():
        # Our handler exits with 143; Ray's with 15 after SIGTERM and with 0 after SIGINT.
        tell("raykd: interrupted; the same command continues from here")
        is_term = isinstance(error, SystemExit) and error.code in (143, signal.SIGTERM)
        return 143 if is_term else 130
    tell(f"raykd: code that the recipe names raised {type(error).__name__}; let it return or raise")
    return 3


def _usage(error: click.ClickException) -> str:
    """What click says of a command line that is wrong."""
    lines = []
    if isinstance(error, click.UsageError) and error.ctx is not None:
        lines = [error.ctx.get_usage(), f"Try '{error.ctx.command_path} --help' for help.", ""]
    return "\n".join([*lines, f"Error: {error.format_message()}"])


def _unforeseen(error: Exception) -> int:
    """Tell of an error that no part of raykd has a message for; its exit code."""
    if os.environ.get("RAYKD_TRACEBACK") == "1":
        traceback.print_exception(error)
    if isinstance(error, OSError):
        tell(f"raykd: {error}; free the disk or name another --out")
        return 5
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    inside = [path.relative_to(HERE) for path in files if path.is_relative_to(HERE)]
    where = ".".join(inside[-1].with_suffix("").parts) if inside else "raykd"
    tell(f"raykd: {text} (in {where}); set RAYKD_TRACEBACK=1 to see where, and report it, please")
    folders = {path.parts[0] for path in inside}
    return 3 if folders & {"data", "store"} else 2 if "recipe" in folders else 5


def _open_closed_streams() -> None:
    """Open what the shell has closed of stdin, stdout and stderr, so that no file takes its place
    and everything can be printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    open_aside()


def _end(code: int) -> NoReturn:
    """Exit; without waiting for threads that the user's code has left behind."""
    main_thread = threading.main_thread()
    left = [t for t in threading.enumerate() if t is not main_thread and not t.daemon]
    if left:
        atexit._run_exitfuncs()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _address(_context: click.Context, _option: click.Parameter, uri: str | None) -> str | None:
    """A server's address that can be one."""
    from raykd.files.address import checked_uri

    try:
        return uri and checked_uri(uri)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all verbs over a recipe share."""
    options = [
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=Path("runs"),
            help="The folder of all results.",
        ),
        click.option(
            "--set",
            "sets",
            metavar="A.B=VALUE",
            multiple=True,
            help="Set one key of the recipe; repeatable.",
        ),
        click.option("--smoke", is_flag=True, help="The fewest steps that still run every stage."),
        click.option(
            "--json", "as_json", is_flag=True, help="The result on stdout as one JSON value."
        ),
        click.option(
            "--address", help="A Ray cluster; else RAY_ADDRESS, else one inside this process."
        ),
        click.option(
            "--allow-import",
            multiple=True,
            metavar="PACKAGE",
            help="Let the recipe import this package.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def recipe_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb over one recipe, from a function of (recipe, out, address)."""

    @cli.command(function.__name__, help=function.__doc__)
    @click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
    @recipe_options
    @wraps(function)
    def command(path: Path, as_json: bool, **options: Any) -> None:
        with stdout_for_results():
            show(*carry_out(function, path, **options), as_json)

    return command


def carry_out(
    function: Callable[..., Any],
    path: Path,
    *,
    out: Path,
    sets: tuple[str, ...],
    smoke: bool,
    address: str | None,
    allow_import: tuple[str, ...],
) -> tuple[Any, str]:
    """The result of a verb over the recipe at `path`: a JSON value, and text for a person."""
    from raykd.stages.load import load

    recipe = load(path, sets, smoke=smoke, allow_import=allow_import)
    return function(recipe, out, address)


@recipe_command
def run(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    """Every stage: score, train with its control, tune if [search] is there, export, report."""
    from raykd.reports import sentences
    from raykd.stages import walk

    report_json = walk.run(recipe, out, address=address)
    return report_json, sentences.table(report_json)


@recipe_command
def check(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    """The plan without computing: stages, what is done, rows, bytes, memory, workers."""
    from raykd.stages import plan

    planned = plan.plan(recipe, out, address)
    return planned, plan.table(planned)


@recipe_command
def score(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    """The teacher's signals for every row, into a verified Parquet store."""
    from raykd.stages import walk

    store = walk.score(recipe, out, address=address)
    return {"store": str(store) if store else None}, str(store or "this recipe reads no teacher")


@recipe_command
def train(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    """Every seed of the student and of its control."""
    from raykd.stages import walk
    from raykd.training.arms import validation_accuracies

    folder = walk.train(recipe, out, address=address)
    accuracies = validation_accuracies(recipe, folder)
    lines = [f"{key}: validation accuracy {value:.3f}" for key, value in accuracies.items()]
    return {"run": str(folder), "val_accuracy": accuracies}, "\n".join([*lines, str(folder)])


@recipe_command
def tune(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    """The trials of [search], over one store; the best one's recipe is best.toml."""
    from raykd.stages import walk

    table = walk.tune(recipe, out, address=address)
    best = table["best"]
    values = ", ".join(f"{key} = {_short(value)}" for key, value in best["params"].items())
    score = f"{table['metric']} {best[table['metric']]:.4f}"
    return table, f"best of {len(table['trials'])} trials: {values}: {score}"


def _short(value: Any) -> str:
    """A trial's value with four digits where it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@recipe_command
def export(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    """The deployable student, whole or not at all."""
    from raykd.stages import walk

    folder = walk.export(recipe, out, address=address)
    return {"artefact": str(folder)}, str(folder)


@cli.command()
@click.argument(
    "paths", metavar="RECIPE | RUN RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@recipe_options
def report(paths: tuple[Path, ...], out: Path, as_json: bool, **options: Any) -> None:
    """report.json and report.html of a recipe, with control, seeds and intervals.

    For two or more run folders: what each gained over the first, in OUT/compare-DIGEST.
    """
    if len(paths) == 1 and not paths[0].is_dir():
        with stdout_for_results():
            show(*carry_out(_report, paths[0], out=out, **options), as_json)
    else:
        show(*_compare(paths, out, **options), as_json)


def _report(recipe: Any, out: Path, address: str | None) -> tuple[Any, str]:
    from raykd.reports import sentences
    from raykd.stages import walk

    report_json = walk.report(recipe, out, address=address)
    return report_json, sentences.table(report_json)


def _compare(paths: tuple[Path, ...], out: Path, **options: Any) -> tuple[Any, str]:
    from raykd.errors import RecipeError
    from raykd.orchestration import cluster
    from raykd.reports.compare import compare, comparison_text

    if len(paths) == 1:
        raise RecipeError(
            f"{paths[0]} is a folder: name a recipe to report on, or more run folders to compare"
        )
    if misplaced := [OPTIONS.get(name, f"--{name}") for name, value in options.items() if value]:
        applies = "applies to a recipe; run folders are compared as they are. Remove it."
        raise RecipeError(f"{', '.join(misplaced)} {applies}")
    cluster.check_stays("--out", out)
    comparison = compare(paths, out)
    return comparison, comparison_text.table(comparison)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout.")
def techniques(as_json: bool) -> None:
    """List the techniques, one line each."""
    from raykd import techniques

    known = techniques.all_techniques()
    rows = [{"name": t.name, "summary": t.summary, "recipe": t.recipe} for t in known]
    show(rows, "\n".join(f"{t.name:<18}{t.summary}" for t in known), as_json)


@cli.command()
@click.argument("table", metavar="[TABLE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout.")
def keys(table: str | None, as_json: bool) -> None:
    """Every key of a recipe, or those of one table: type, default and meaning.

    \b
        raykd keys optim
        raykd keys terms.kd
    """
    from raykd import techniques
    from raykd.recipe import keys as recipe

    # Terms need torch. Without their names, a table is found at once.
    needs_terms = table is None or table.partition(".")[0] == "terms"
    known = recipe.recipe_keys(techniques.term_tables() if needs_terms else None)
    chosen = known if table is None else recipe.select(known, table)
    show([vars(key) for key in chosen], recipe.text(chosen), as_json)


@cli.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    help="The folder of all results.",
)
@click.option(
    "--uri",
    callback=_address,
    help="The MLflow server to knock at; else the sqlite file under --out.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout.")
def doctor(out: Path, uri: str | None, as_json: bool) -> None:
    """Versions, Ray, memory, disk, MLflow: what is wrong and what to type.

    Exit code 5 if something is.
    """
    from raykd.errors import InfraError
    from raykd.stages import doctor as checkup

    checks = checkup.examine(out, uri)
    show(checks, checkup.table(checks), as_json)
    if not all(check["ok"] for check in checks):
        raise InfraError("something is wrong; see the lines marked !")


cli.add_command(store)


@cli.group()
def track() -> None:
    """The MLflow record of a run."""


@track.command("sync")
@click.argument(
    "folder", metavar="RUN", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option(
    "--uri", callback=_address, help="The MLflow server; else the one of the run's recipe."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout.")
def track_sync(folder: Path, uri: str | None, as_json: bool) -> None:
    """Replay a run's journal into MLflow; what is there already is left alone."""
    from raykd.errors import InfraError, StoreError
    from raykd.files import links
    from raykd.files.atomic import read_json
    from raykd.tracking import mlflow_mirror
    from raykd.training import run_digests, run_files

    links.check_tree(folder)
    run_digests.check(folder)
    path = folder / run_files.RECIPE
    resolved = read_json(path)
    if resolved is None:
        raise StoreError(f"{folder} is not a run folder: it has no recipe.json")
    table = resolved.get("track") if isinstance(resolved, dict) else None
    if not isinstance(table, dict):
        table = {}
    has_names = isinstance(table.get("experiment"), str)
    if not has_names or not isinstance(table.get("uri"), str | None):
        raise StoreError(f"{path} is damaged: no [track] in it; run its recipe again")
    where = uri or table.get("uri") or mlflow_mirror.default_uri(folder.resolve().parent)
    synced = mlflow_mirror.sync(folder, uri=where, experiment=table["experiment"])
    if not synced.done:
        raise InfraError(f"{synced.reason}; {synced.pending} lines still wait")
    show(
        vars(synced),
        f"{len(synced.runs)} runs are recorded in {mlflow_mirror.public_uri(where)}",
        as_json,
    )


if __name__ == "__main__":
    main()
