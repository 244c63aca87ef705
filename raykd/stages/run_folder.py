"""The run folder of a recipe: where its results stand, and what has been done there."""

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raykd import data
from raykd.data import Dataset, Table
from raykd.data.prepared.parts import PreparedParts
from raykd.data.table import Source, in_memory
from raykd.deploy import run_artefact
from raykd.errors import RecipeError
from raykd.files import links
from raykd.files.address import Address, is_url
from raykd.files.digests import is_hidden
from raykd.losses.reads import stored_for
from raykd.orchestration import cluster, preparing, scoring
from raykd.recipe.recipe import Recipe
from raykd.recipe.toml import is_path
from raykd.teacher.identity import run_digest, signals_of
from raykd.tracking import mlflow_mirror, run_log
from raykd.tracking.journal import Journal
from raykd.training import run_digests, run_files, trained_arm
from raykd.training.arms import arms_of

OUT = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """One recipe's folder `<out>/<name>-<digest8>/`; `address` is the Ray cluster's, if named.

    RecipeError where it would lie in a folder that Ray deletes, or among the rows.
    """

    recipe: Recipe
    out: Path = OUT
    address: str | None = None

    def __post_init__(self) -> None:
        """RecipeError if Ray deletes what is in the folder, if the next command would read it as
        rows, or if MLflow and others would write its name otherwise than Python.
        """
        path = str(self.out.resolve())
        try:
            is_same = path.encode() == os.fsencode(path)
        except UnicodeEncodeError:
            is_same = False
        if not is_same:
            raise RecipeError(
                f"--out: {path!a} cannot be written under this locale, whose file names are "
                f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or name a "
                "folder in plain letters"
            )
        cluster.check_stays("--out", self.out)
        self._check_no_rows("--out", self.out)
        store = self.recipe.scale.store
        if store and not is_url(store):
            cluster.check_stays("scale.store", Path(store))
        if store:
            self._check_no_rows("scale.store", store)

    def _check_no_rows(self, key: str, results: Address) -> None:
        """RecipeError where results lie below `data.source`, whose files are the rows."""
        source = self.recipe.data.source
        if not is_path(source) or is_url(source) != is_url(results):
            return
        if is_url(source):
            inner = f"{results}/".removeprefix(f"{source.rstrip('/')}/")
            is_below = inner != f"{results}/"
        else:
            path = Path(results).resolve()
            rows = Path(source).resolve()
            is_below = path.is_relative_to(rows)
            inner = "/".join(path.parts[len(rows.parts) :])
        if is_below and not is_hidden(inner):
            raise RecipeError(
                f"{key}: {results} lies below data.source {source}, so the next command would read "
                "what this one writes as rows; name a folder beside it"
            )

    @cached_property
    def path(self) -> Path:
        """The absolute path of the folder, which need not exist.

        StoreError where there is a link that leads out of `out`.
        """
        digest = run_digest(self.recipe, self.table)
        out = self.out.resolve()
        path = out / f"{self.recipe.name}-{digest[:8]}"
        links.check_inside(path, out)
        return path

    @cached_property
    def source(self) -> Source:
        """The recipe's rows: in memory, or read in parts, which may have to be prepared before."""
        home = preparing.rows_address(self.recipe, self.out.resolve())
        source = data.open_source(self.recipe.data, self.recipe.optim.order, home, self.recipe.task)
        if isinstance(source, PreparedParts):
            self._check_no_rows("scale.store" if self.recipe.scale.store else "--out", home)
        return source

    @property
    def table(self) -> Table:
        """What is known of the rows without reading them."""
        return self.source.table()

    @cached_property
    def dataset(self) -> Dataset:
        """The rows that are held in memory: all, or those of validation and test."""
        return in_memory(self.source)

    @cached_property
    def store(self) -> Address | None:
        """The address of the recipe's teacher store, which need not exist; None where neither its
        arms nor its trials read one.
        """
        if self.recipe.teacher is None or not stored_for(self.recipe):
            return None
        address, _ = scoring.locate(self.recipe, self.table, self.out.resolve())
        return address

    @property
    def is_scored(self) -> bool:
        """Whether the teacher store is complete, or none is read."""
        return self.store is None or scoring.is_complete(self.store, signals_of(self.recipe))

    @property
    def untrained(self) -> list[str]:
        """The keys of the arms that are not trained yet. StoreError if one was changed since."""
        keys = [arm.key for arm in arms_of(self.recipe)]
        return [key for key in keys if trained_arm.read_record(self.path, key) is None]

    @property
    def is_searched(self) -> bool:
        """Whether the search is done, or none is asked for. StoreError if its table was changed."""
        if self.recipe.search is None:
            return True
        run_digests.is_recorded(self.path, run_files.BEST_RECIPE)
        run_digests.is_recorded(self.path, run_files.TRIALS)
        return run_files.read_trials(self.path) is not None

    @property
    def is_exported(self) -> bool:
        """Whether the artefact exists in the forms that the recipe asks for.

        StoreError if a file of it, or its answers, were changed.
        """
        names = [name for name in run_files.EXPORTED if (self.path / name).exists()]
        is_known = all(run_digests.is_recorded(self.path, name) for name in names)
        return is_known and run_artefact.is_whole(self.recipe, self.path)

    @property
    def is_reported(self) -> bool:
        """Whether a report exists, be it of what is done now or of what was done before."""
        return (self.path / run_files.REPORT).exists()

    def check_links(self) -> None:
        """StoreError if something in the folder is a link that leads out of it, or no file."""
        links.check_tree(self.path)

    def journal(self) -> Journal:
        """The run's journal, begun if it is new."""
        return run_log.open_journal(self.recipe, self.table, self.path, self.store)

    @property
    def uri(self) -> str:
        """The MLflow server that mirrors the run."""
        return self.recipe.track.uri or mlflow_mirror.default_uri(self.out)
