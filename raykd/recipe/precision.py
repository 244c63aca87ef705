"""The `[precision]` table: in which numbers models compute. Needs no torch."""

from typing import Literal

from raykd.recipe.tables import Table


class Precision(Table):
    """The numbers that models compute in; weights, optimiser and losses of a student stay fp32.

    A teacher is loaded straight in its numbers, and its store's id has them. A student computes its
    layers in bf16 by autocast; it is validated, tested and shipped in fp32.

    Example:
        >>> Precision(teacher="bf16").student
        'fp32'
    """

    teacher: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The numbers of the teacher's weights and layers; it is part of the store's id."""
    student: Literal["fp32", "bf16"] = "fp32"
    """The numbers of the student's layers in training; its weights stay fp32."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention in one fused call, or step by step as terms that read it need it."""
    matmul: Literal["highest", "high"] = "highest"
    """Matrix products of fp32: as they are, or in TF32 on a GPU that has it."""


FP32 = Precision()
