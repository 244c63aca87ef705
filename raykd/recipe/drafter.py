"""The `[drafter]` table: how students are judged as their teacher's drafters. Needs no torch."""

from typing import Annotated

from pydantic import Field

from raykd.recipe.tables import Count, Table


class Drafter(Table):
    """How student and control are judged as the teacher's drafters, by speculative decoding.

    Of `prompts` test rows, each row's own prompt or its first `prompt` tokens are continued by
    `count` tokens at `temperature`. `gamma` tokens are drafted for each call of the teacher.
    """

    prompts: Count = 64
    """Test rows that are continued."""
    prompt: Count = 32
    """Tokens of each row that are given, unless it has a prompt of its own."""
    count: Count = 64
    """Tokens written after each prompt."""
    gamma: Count = 4
    """Tokens drafted for each call of the teacher."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """The temperature of the drawn tokens; 0 is greedy."""
