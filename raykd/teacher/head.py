"""A teacher's frozen head, which turns stored hidden states into logits again."""

from torch import Tensor

from raykd.data.rows import Facts
from raykd.models.build import build_frozen
from raykd.models.form import CPU, Form
from raykd.recipe.recipe import Recipe
from raykd.store.codecs.hidden import Hidden
from raykd.store.reader import Store


def teacher_head(recipe: Recipe, store: Store, rows: Facts) -> tuple[Tensor, Tensor | None] | None:
    """(weight (C, D), bias (C,) or None) of the head that a store of hidden states needs.

    Only the columns of the data's classes; None for a store of any other codec. StoreError if the
    store was written with another head.
    """
    if store.manifest["identity"]["store"]["codec"] != Hidden.name:
        return None
    codec = store.codec("train")
    assert isinstance(codec, Hidden)
    assert recipe.teacher is not None
    form = Form.of_teacher(recipe.precision, CPU)
    teacher = build_frozen(recipe.teacher, rows.shape, form, key="teacher")
    head = teacher.get_submodule(recipe.store.head)
    assert isinstance(head.weight, Tensor)
    weight = head.weight.detach().float()
    bias = None
    if isinstance(head.bias, Tensor):
        bias = head.bias.detach().float()
    codec.check_head(weight, bias)
    classes = len(rows.classes)
    return weight[:classes], None if bias is None else bias[:classes]
