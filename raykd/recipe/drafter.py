"""The `[drafter]` table: how students are judged as their teacher's drafters. Needs no torch."""

from typing import Annotated

from pydantic import Field

from raykd.recipe.tables import Positive, Table


class Drafter(Table):
    """How student and control are judged as the teacher's drafters, by speculative decoding.

    Of `prompts` test rows, each row's own prompt or its first `prompt` tokens are continued by
    `count` tokens at `temperature`. `gamma` tokens are drafted for each call of the teacher.
    """

    prompts: Positive = 64
    prompt: Positive = 32
    count: Positive = 64
    gamma: Positive = 4
    temperature: Annotated[float, Field(ge=0)] = 1.0
