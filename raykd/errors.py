"""Errors a user can act on: each says what was found, where, and what to type; each has its exit
code.
"""

from dataclasses import dataclass


class RaykdError(Exception):
    """Base of every error that raykd raises for its user, with the command's `exit_code`."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One fault in a recipe: the dotted key, what was found, what would do."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class RecipeError(RaykdError):
    """A recipe or a command line that cannot be carried out (exit code 2)."""

    exit_code = 2

    def __init__(self, problems: list[Problem] | str, *, where: str = ""):
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        count = f"{len(self.problems)} error{'s' if len(self.problems) != 1 else ''}"
        title = f"{where}: {count}\n" if where else ""
        indent = "  " if where else ""
        super().__init__(title + "\n".join(f"{indent}{p}" for p in self.problems))

    def __reduce__(self):  # Ray carries errors between processes by pickle
        return _rebuild, (self.problems, str(self))


def _rebuild(problems: list[Problem], text: str) -> RecipeError:
    error = RecipeError(problems)
    error.args = (text,)
    return error


class DataError(RaykdError):
    """Rows that cannot be used: a missing column, a label outside the classes, an empty split
    (exit code 3).
    """

    exit_code = 3


class Diverged(DataError):
    """A training whose gradient is no longer finite; on every worker at the same step (exit code
    3).
    """


class StoreError(RaykdError):
    """A store or run folder that is incomplete, damaged or of another recipe (exit code 3)."""

    exit_code = 3


class GateError(RaykdError):
    """A quality gate that the artefact did not meet (exit code 4)."""

    exit_code = 4


class InfraError(RaykdError):
    """A cluster, disk or server that failed for good after bounded retries (exit code 5)."""

    exit_code = 5
