"""The run folder of a recipe: where its results stand, and what has been done there."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raykd import data
from raykd.data import Dataset
from raykd.deploy import run_artefact
from raykd.files.address import Address
from raykd.losses.terms import needs_of
from raykd.orchestration import scoring
from raykd.recipe.recipe import Recipe
from raykd.teacher.identity import run_digest, signals_of
from raykd.tracking import mlflow_mirror, run_log
from raykd.tracking.journal import Journal
from raykd.training import run_files
from raykd.training.arms import arms_of

OUT = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """One recipe's folder `<out>/<name>-<digest8>/`; `address` is the Ray cluster's, if named."""

    recipe: Recipe
    out: Path = OUT
    address: str | None = None

    @cached_property
    def path(self) -> Path:
        """The absolute path of the folder, which need not exist."""
        digest = run_digest(self.recipe, self.dataset)
        return (self.out / f"{self.recipe.name}-{digest[:8]}").resolve()

    @cached_property
    def dataset(self) -> Dataset:
        """The recipe's data, loaded once."""
        return data.load(self.recipe.data)

    @cached_property
    def store(self) -> Address | None:
        """The address of the recipe's teacher store, which need not exist; None without one."""
        if self.recipe.teacher is None or not needs_of(self.recipe.terms):
            return None
        address, _ = scoring.locate(self.recipe, self.dataset, self.out.resolve())
        return address

    @property
    def is_scored(self) -> bool:
        """Whether the teacher store is complete, or none is read."""
        return self.store is None or scoring.is_complete(self.store, signals_of(self.recipe))

    @property
    def untrained(self) -> list[str]:
        """The keys of the arms that are not trained yet."""
        keys = [arm.key for arm in arms_of(self.recipe)]
        return [key for key in keys if not run_files.arm_record(self.path, key).exists()]

    @property
    def is_searched(self) -> bool:
        """Whether the search is done, or none is asked for."""
        return self.recipe.search is None or (self.path / run_files.TRIALS).exists()

    @property
    def is_exported(self) -> bool:
        """Whether the artefact exists in the forms that the recipe asks for."""
        return run_artefact.is_whole(self.recipe, self.path)

    @property
    def is_reported(self) -> bool:
        """Whether a report exists, be it of what is done now or of what was done before."""
        return (self.path / run_files.REPORT).exists()

    def journal(self) -> Journal:
        """The run's journal, begun if it is new."""
        return run_log.open_journal(self.recipe, self.dataset, self.path, self.store)

    @property
    def uri(self) -> str:
        """The MLflow server that mirrors the run."""
        return self.recipe.track.uri or mlflow_mirror.default_uri(self.out)
