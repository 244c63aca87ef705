"""The `[drafter]` table: how students are judged as their teacher's drafters. Needs no torch."""

from typing import Annotated

from pydantic import Field

from raykd.recipe.tables import Positive, Table


class Drafter(Table):
    """Student and control judged as the teacher's drafter: `prompts` test rows, of each its own
    prompt or `prompt` tokens, and `count` tokens after them by speculative decoding, `gamma`
    drafted for each call of the teacher, at `temperature`.
    """

    prompts: Positive = 64
    prompt: Positive = 32
    count: Positive = 64
    gamma: Positive = 4
    temperature: Annotated[float, Field(ge=0)] = 1.0
