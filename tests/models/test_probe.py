"""What is wrong with a model is known before any work: two rows are put to it."""

import pytest
import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.probe import ProbeRows, check_shared, check_student, check_teacher
from raykd.models.series_encoder import SeriesEncoder

STEPS = 9
CHANNELS = 3
CLASSES = 4


def rows_of(short: int) -> ProbeRows:
    mask = torch.arange(STEPS) < torch.tensor([[short], [STEPS]])
    inputs = torch.randn(2, STEPS, CHANNELS, generator=torch.Generator().manual_seed(0))
    return ProbeRows(inputs * mask[..., None], mask, CLASSES)


EQUAL = rows_of(STEPS)
RAGGED = rows_of(4)


class Steps(nn.Module):
    """Its own answer made of what a linear layer says at each step."""

    def __init__(self, answer=lambda z: z, classes: int = CLASSES):
        super().__init__()
        self.linear = nn.Linear(CHANNELS, classes)
        self.answer = answer

    def forward(self, inputs: Tensor) -> object:
        return self.answer(self.linear(inputs))


class Gru(nn.Module):
    """Reads to both sides; with `reads_mask` only where the mask is True."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(CHANNELS, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.gru(inputs)[0])


class Mean(nn.Module):
    """The mean over steps, of whole rows; under `name` it takes a mask."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.mean(1) + 1)


class MaskedMean(Mean):
    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        assert mask.dtype == torch.bool
        return self.head((inputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) + 1)


class AttentionMaskedMean(Mean):
    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        weight = (1 - attention_mask.logical_not().long())[..., None]
        assert not attention_mask.is_floating_point()
        assert attention_mask.dtype == torch.int64
        return self.head((inputs * weight).sum(1) / weight.sum(1) + 1)


class Deaf(Mean):
    """Takes the mask and does nothing with it."""

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.head(inputs.mean(1) + 1)


class Flat(nn.Module):
    """Of one number of steps, which all its rows have, padded."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(STEPS * CHANNELS, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Zeroed(Gru):
    """Its head starts at zero, which hides that it reads padding."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


class Crowd(Steps):
    """Answers by the other rows of the batch."""

    def forward(self, inputs: Tensor) -> object:
        return self.linear(inputs) - self.linear(inputs).mean(0)


class Tall(nn.Module):
    """Fails on rows that are shorter than its kernel, and reads padding."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, CLASSES, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.conv(inputs.mT).mean(2)


def frozen() -> nn.Module:
    return Steps().requires_grad_(False)


HOLES = rows_of(STEPS)._replace(mask=torch.arange(STEPS) % 3 != torch.tensor([[1], [9]]))
HOLES = HOLES._replace(inputs=HOLES.inputs * HOLES.mask[..., None])
LEFT = rows_of(STEPS)._replace(mask=torch.arange(STEPS) >= torch.tensor([[4], [0]]))
LEFT = LEFT._replace(inputs=LEFT.inputs * LEFT.mask[..., None])


GOOD = {
    "steps": (Steps, EQUAL),
    "steps, ragged": (Steps, RAGGED),
    "encoder, ragged": (
        lambda: SeriesEncoder(channels=CHANNELS, classes=CLASSES, steps=STEPS),
        RAGGED,
    ),
    "reads to both sides, equal": (Gru, EQUAL),
    "mean, equal": (Mean, EQUAL),
    "mask": (MaskedMean, RAGGED),
    "attention_mask": (AttentionMaskedMean, RAGGED),
    "one number of steps": (Flat, RAGGED),
    "steps, with holes": (Steps, HOLES),
    "mask, with holes": (MaskedMean, HOLES),
    "attention_mask, padded in front": (AttentionMaskedMean, LEFT),
    "one number of steps, with holes": (Flat, HOLES),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_model_that_can_be_trained_is_let_through(name):
    make, rows = GOOD[name]
    check_student(make(), "student", rows)
    check_teacher(make(), "teacher", rows)


BOTH = {
    "more classes": (lambda: Steps(classes=5), EQUAL, "5 classes, and the data have 4"),
    "fewer classes": (lambda: Steps(classes=2), EQUAL, "2 classes, and the data have 4"),
    "one output": (lambda: Steps(lambda z: z[..., 0].mean(1)), EQUAL, r"with \(2,\); give logits"),
    "integers": (lambda: Steps(lambda z: z.argmax(-1)), EQUAL, r"answers with int64 \(2, 9\)"),
    "twice the steps": (
        lambda: Steps(lambda z: torch.cat([z, z], 1)),
        EQUAL,
        r"answers 2 rows of 9 steps with \(2, 18, 4\)",
    ),
    "a list": (lambda: Steps(lambda z: [z]), EQUAL, "with a list without logits"),
    "valence of rows": (
        lambda: Steps(lambda z: {"logits": z, "valence": z[:, 0, 0]}),
        EQUAL,
        r"valence \(2,\)",
    ),
    "infinite": (lambda: Steps(lambda z: z / 0), EQUAL, "NaN or infinite"),
    "by chance": (lambda: Steps(lambda z: z + torch.rand_like(z)), EQUAL, "the same rows twice"),
    "an error": (lambda: Steps(lambda z: z @ z), EQUAL, "fails on float32 rows of 2x9x3: Runtime"),
    "double": (lambda: Steps().double(), EQUAL, "float64|Double"),
    "bfloat16": (lambda: Steps().bfloat16(), EQUAL, "bfloat16|BFloat16"),
    "both sides, ragged": (Gru, RAGGED, "row of 4 steps otherwise when it is padded to 9"),
    "mean, ragged": (Mean, RAGGED, "rows here are of unequal length; give its forward a param"),
    "mask unread": (Deaf, RAGGED, "gets a mask, and still answers a row of 4 steps otherwise"),
    "too tall": (Tall, RAGGED, "row of 8 steps otherwise when it is padded to 9"),
    "both sides, with holes": (Gru, HOLES, "rows here have it before steps; give its forward"),
    "both sides, padded in front": (Gru, LEFT, "reads padding, .* or pad behind the steps"),
    "mask unread, padded in front": (Deaf, LEFT, "it gets a mask; read only steps where that is"),
    "by the others": (Crowd, EQUAL, "otherwise beside another one"),
}


@pytest.mark.parametrize("name", BOTH)
def test_a_model_that_cannot_is_refused_by_its_key(name):
    make, rows, message = BOTH[name]
    with pytest.raises(RecipeError, match=message) as refused:
        check_student(make(), "student", rows)
    assert [problem.key for problem in refused.value.problems] == ["student.model"]
    with pytest.raises(RecipeError, match=message) as refused:
        check_teacher(make(), "teacher", rows)
    assert [problem.key for problem in refused.value.problems] == ["teacher.model"]


STUDENTS = {
    "frozen": (frozen, EQUAL, "no parameter requires a gradient"),
    "detached": (lambda: Steps(torch.detach), EQUAL, "no parameter gets a gradient"),
    "half in, half out": (lambda: Steps(Tensor.bfloat16), EQUAL, "answers with bfloat16"),
    "zeros at first": (Zeroed, RAGGED, "row of 4 steps otherwise when it is padded to 9"),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_what_only_a_student_must_do_is_asked_of_a_student(name):
    make, rows, message = STUDENTS[name]
    with pytest.raises(RecipeError, match=message):
        check_student(make(), "student", rows)


def test_a_teacher_may_be_frozen_and_of_text_have_more_columns_than_tokens():
    check_teacher(frozen(), "teacher", EQUAL)
    check_teacher(Steps(classes=5), "teacher", EQUAL._replace(may_have_more=True))
    tokens = torch.randint(CLASSES, (2, 8, 2), dtype=torch.int32)
    tokens[..., 1] = torch.arange(8)
    rows = ProbeRows(tokens, torch.ones(2, 8, dtype=torch.bool), CLASSES)
    sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "inner": 32}
    check_student(Llama(classes=CLASSES, steps=8, **sizes), "student", rows)
    with pytest.raises(RecipeError, match="6 classes, and the data have 4"):
        check_student(Llama(classes=6, steps=8, **sizes), "student", rows)


class Norm(Steps):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS)

    def forward(self, inputs: Tensor) -> object:
        return super().forward(self.norm(inputs.mT).mT)


class NormOfRows(Mean):
    """Of single rows its BatchNorm has no statistics."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(CHANNELS, CLASSES), nn.BatchNorm1d(CLASSES))


class Dropping(Steps):
    def forward(self, inputs: Tensor) -> object:
        return super().forward(nn.functional.dropout(inputs, 0.3, self.training))


def recurrent() -> nn.Module:
    module = Gru()
    module.gru = nn.GRU(CHANNELS, 8, num_layers=2, dropout=1e-3, bidirectional=True)
    return module


UNSHARED = {
    "statistics of steps": (Norm, "by the others of its batch in training, as BatchNorm"),
    "statistics of rows": (NormOfRows, "cannot read one row in training"),
    "a layer of dropout": (lambda: nn.Sequential(nn.Dropout(1e-3), Steps()), r"chance .*\(0\)"),
    "dropout by hand": (Dropping, "draws by chance in training, so a batch in parts"),
    "dropout of a recurrence": (recurrent, r"draws by chance in training \(gru\)"),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_a_student_that_workers_would_train_otherwise_is_refused(name):
    make, message = UNSHARED[name]
    with pytest.raises(RecipeError, match=message) as refused:
        check_shared(make(), "student", EQUAL)
    assert [problem.key for problem in refused.value.problems] == ["student.model"]
    assert "scale.workers = 1" in str(refused.value)


def test_a_student_without_chance_may_be_shared():
    for make, rows in GOOD.values():
        check_shared(make(), "student", rows)
    check_shared(nn.Sequential(nn.Dropout(0.0), Steps(), nn.InstanceNorm1d(9)), "student", EQUAL)


def test_the_mask_goes_in_with_every_batch_of_series_and_never_with_text():
    inputs, mask, _, _ = RAGGED
    adapter = Adapter(MaskedMean())
    alone = adapter(inputs[:1, :4], mask[:1, :4]).logits
    torch.testing.assert_close(adapter(inputs, mask).logits[:1], alone)

    class Text(nn.Module):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is None
            return tokens[..., :1].float()

    Adapter(Text())(torch.ones(2, 3, 2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.bool))
