"""Speculative text against the teacher's own: token by token at temperature 0, by chi-square above
it.

Teachers are small random Llamas, drafters a noisy copy or what the teacher says after one token, so
that some drafts stay and some do not; tables of fixed laws have closed forms of acceptance and
block efficiency.
"""

import copy
import itertools
import os
import random
from collections.abc import Sequence
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raykd.deploy.onnx import write_decoder
from raykd.deploy.onnx.decoder import Decoder, OnnxReader
from raykd.errors import DataError, RecipeError
from raykd.generation.reader import TorchReader
from raykd.generation.speculative import (
    WrittenText,
    draw,
    generate,
    judge,
    law,
    predicted_speedup,
    residual,
    speculate,
)
from raykd.models.llama import Llama

VOCAB = 50
STEPS = 96
LEVEL = 1e-3  # of every chi-square test, whose seeds are fixed


def llama(vocab: int = VOCAB, steps: int = STEPS, seed: int = 0) -> Llama:
    """Weights large enough that no law is flat, attention's smaller: the last token decides more
    than half the time.
    """
    torch.manual_seed(seed)
    module = Llama(
        classes=vocab, steps=steps, width=16, layers=1, heads=2, kv_heads=1, inner=24, tied=False
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(12) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        module.model.layers[0].self_attn.o_proj.weight.mul_(0.1)
    return module.eval()


def noisy(module: Llama, noise: float = 0.04) -> Llama:
    other = copy.deepcopy(module)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(
                parameter.shape, generator=draws, dtype=parameter.dtype
            )
    return other


def prompts(count: int, *, length: int = 4, vocab: int = VOCAB) -> list[list[int]]:
    return torch.randint(
        vocab, (count, length), generator=torch.Generator().manual_seed(2)
    ).tolist()


class Table:
    """A reader whose next token depends on the last one alone, by rows of a table of probabilities
    (V, V).
    """

    def __init__(self, table: Tensor, steps: int = 10**6):
        self.steps = steps
        self.length = 0
        self._logits = table.log()

    def step(self, tokens: Sequence[int]) -> Tensor:
        self.length += len(tokens)
        return self._logits[torch.tensor(tokens)]

    def rollback(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length


def after_one(module: Llama) -> Table:
    """What a Llama says after each token alone: a drafter of the same numbers, without context."""
    with torch.inference_mode():
        return Table(law(module(torch.arange(module.settings["classes"])[:, None])["logits"][:, 0]))


class Whole:
    """A reader without a cache: it reads everything anew at every step."""

    def __init__(self, module: Llama):
        self.steps = module.settings["steps"]
        self._module = module
        self._tokens = []

    @property
    def length(self) -> int:
        return len(self._tokens)

    def step(self, tokens: Sequence[int]) -> Tensor:
        self._tokens += tokens
        return self._module(torch.tensor([self._tokens]))["logits"][0, -len(tokens) :]

    def rollback(self, length: int) -> None:
        del self._tokens[length:]


def fixed(row: Sequence[float]) -> Table:
    """The same law after every token."""
    return Table(torch.tensor(row, dtype=torch.float64).expand(len(row), -1))


def some_law(size: int) -> st.SearchStrategy[Tensor]:
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 1))
    rows = st.lists(weight, min_size=size, max_size=size).filter(any)
    return rows.map(lambda row: torch.tensor(row, dtype=torch.float64) / sum(row))


@settings(deadline=None)
@given(some_law(6), some_law(6))
def test_what_stays_and_what_replaces_it_add_up_to_the_teachers_law(p, q):
    overlap = torch.minimum(p, q)
    torch.testing.assert_close(
        overlap + (1 - overlap.sum()) * residual(p, q), p, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(residual(p, q).sum(), torch.ones((), dtype=torch.float64))


@settings(deadline=None)
@given(some_law(6))
def test_equal_laws_leave_no_residual_and_every_draft_stays(p):
    assert torch.equal(residual(p, p), p)
    drafted = [int(p.argmax()), int(p.nonzero()[0])]
    for seed in range(5):
        done = judge(drafted, p.expand(3, -1), [p, p], draws=random.Random(seed))
        assert (done.accepted, done.tested) == (2, 2)
        assert p[done.token] > 0
        assert done.p == done.q


@settings(deadline=None, max_examples=40)
@given(some_law(7), st.sampled_from([torch.float32, torch.float64]))
def test_draws_over_an_even_grid_count_the_law_and_nothing_of_weight_0_is_drawn(p, dtype):
    grid = 100
    counts = torch.bincount(
        torch.tensor([draw(3 * p.to(dtype), (i + 0.5) / grid) for i in range(grid)]), minlength=7
    )
    assert (counts / grid - p).abs().max() <= 1.01 / grid
    for u in (0.0, 1 - 2**-53):
        assert p[draw(p.to(dtype), u)] > 0


def test_laws_are_softmax_at_a_temperature_over_the_ids_in_use():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 9.0]])
    padded = torch.tensor([[1.0, 3.0, 2.0, 3.0, float("-inf")]])
    for temperature in (0.0, 0.5, 1.0, 2.0):
        found = law(logits, temperature, 4)
        assert found.shape == (1, 4)
        torch.testing.assert_close(found, law(padded, temperature)[:, :4])
        torch.testing.assert_close(found.sum(1), torch.ones(1))
    torch.testing.assert_close(law(logits, 2.0), (logits / 2).softmax(1))
    assert law(logits, 0.0, 4).tolist() == [[0, 1, 0, 0]], "the first of two that are equal"
    torch.testing.assert_close(law(logits[:, :3], 1e-2), law(logits[:, :3], 0.0))
    assert law(logits.bfloat16()).dtype == torch.float32


ASKED = int(os.environ.get("RAYKD_GREEDY_PROMPTS", "150"))  # 1,000 take a minute


@pytest.mark.parametrize(("kind", "number"), [("after one", ASKED), ("noisy", 15)])
def test_greedy_text_is_the_teachers(kind, number):
    """In float64, where one call for many tokens and one for each differ by 1e-15 and no two logits
    are that near.
    """
    teacher = llama().double()
    count = 64
    asked = prompts(number)
    ids = torch.tensor(asked)
    cache = teacher.cache(number)
    cache.keys = cache.keys.double()
    cache.values = cache.values.double()
    wanted = [ids]
    with torch.inference_mode():
        for _ in range(count):
            wanted.append(teacher(wanted[-1], cache)["logits"][:, -1:].argmax(-1))
    straight = torch.cat(wanted[1:], 1).tolist()
    drafter = after_one(teacher) if kind == "after one" else TorchReader(noisy(teacher))
    found = [
        speculate(TorchReader(teacher), drafter, prompt, count, gamma=4, temperature=0.0)
        for prompt in asked
    ]
    assert [text.tokens for text in found] == straight
    calls = sum(t.teacher_calls for t in found)
    tested = sum(r.tested for t in found for r in t.rounds)
    share = sum(r.accepted for t in found for r in t.rounds) / tested
    print(
        f"greedy: {share:.3f} of {tested} tested drafts stayed, {number * count / calls:.2f} "
        "tokens a call"
    )
    assert 0.3 < share < 0.95, "neither side decides alone"
    assert all(t.acceptance == t.accepted_share for t in found), (
        "one-point laws overlap wholly or not at all"
    )
    assert len({tuple(text) for text in straight}) > number / 2


def test_in_float32_greedy_texts_part_only_where_two_logits_are_as_near_as_its_rounding():
    teacher = llama()
    reader = TorchReader(teacher)
    drafter = after_one(teacher)
    parted = 0
    for prompt in prompts(25):
        found = speculate(reader, drafter, prompt, 64, gamma=4, temperature=0.0).tokens
        straight = generate(reader, prompt, 64, temperature=0.0).tokens
        where = next((i for i in range(64) if found[i] != straight[i]), None)
        if where is not None:
            parted += 1
            said = teacher(torch.tensor([prompt + straight[:where]]))["logits"][0, -1]
            assert (said[straight[where]] - said[found[where]]).abs() <= 1e-5 * said.abs().max()
    assert parted <= 2


def chi_square_level(counts: Tensor, p: Tensor) -> float:
    """The probability of a chi-square as large, of counts (K,) against a law (K,)."""
    wanted = p * counts.sum()
    assert wanted.min() > 5, "too few draws for the approximation"
    found = ((counts - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(p) - 1) / 2), found / 2))


def counted(texts: Sequence[WrittenText], vocab: int, count: int) -> Tensor:
    """(vocab^count,): how often each text came."""
    place = vocab ** torch.arange(count - 1, -1, -1)
    return torch.bincount(torch.tensor([t.tokens for t in texts]) @ place, minlength=vocab**count)


def test_sampled_texts_have_the_law_of_the_teacher():
    """All 27 texts of three tokens, their probabilities by the teacher's whole pass; caches on both
    sides.
    """
    vocab = 3
    count = 3
    prompt = [1, 2]
    number = 1000
    temperature = 0.8
    teacher = llama(vocab, seed=3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.6)
        every = torch.tensor(list(itertools.product(range(vocab), repeat=count)))
        whole = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], 1)
        logp = (teacher(whole)["logits"][:, 1:-1] / temperature).log_softmax(-1)
    p = logp.gather(2, every[..., None]).sum((1, 2)).double().exp()
    ours = TorchReader(teacher)
    theirs = TorchReader(noisy(teacher, 0.3))
    found = [
        speculate(ours, theirs, prompt, count, gamma=2, temperature=temperature, seed=i)
        for i in range(number)
    ]
    plain, alone = (
        [generate(reader, prompt, count, temperature=temperature, seed=i) for i in range(number)]
        for reader in (ours, theirs)
    )
    overlap = [value for t in found for r in t.rounds for value in r.overlap]
    levels = [chi_square_level(counted(texts, vocab, count), p) for texts in (found, plain)]
    print(
        f"chi-square levels {levels}, mean overlap {sum(overlap) / len(overlap):.3f}, "
        f"{p.min():.4f} the rarest text"
    )
    assert 0.4 < sum(overlap) / len(overlap) < 0.95
    assert min(levels) > LEVEL
    assert chi_square_level(counted(alone, vocab, count), p) < LEVEL**2, (
        "the test tells the drafter's law apart"
    )


@pytest.mark.parametrize("gamma", [1, 3, 6])
def test_texts_of_a_table_have_its_law_for_any_number_of_drafts(gamma):
    draws = torch.Generator().manual_seed(4)
    ours, theirs = (torch.rand(3, 3, generator=draws, dtype=torch.float64) + 0.15 for _ in range(2))
    ours = ours / ours.sum(1, keepdim=True)
    theirs = theirs / theirs.sum(1, keepdim=True)
    p = torch.stack(
        [ours[1, a] * ours[a, b] * ours[b, c] for a, b, c in itertools.product(range(3), repeat=3)]
    )
    found = [
        speculate(Table(ours), Table(theirs), [1], 3, gamma=gamma, seed=i) for i in range(2500)
    ]
    assert chi_square_level(counted(found, 3, 3), p) > LEVEL


# sum min = 0.7
P = [0.5, 0.3, 0.2, 0.0]
Q = [0.2, 0.3, 0.3, 0.2]


@pytest.mark.parametrize("gamma", [1, 2, 5, 9])
def test_fixed_laws_are_accepted_by_their_overlap_and_a_call_gives_the_closed_forms_tokens(gamma):
    a = sum(map(min, P, Q))
    count = 4000
    found = speculate(fixed(P), fixed(Q), [0], count, gamma=gamma, seed=gamma)
    assert found.acceptance == pytest.approx(a, abs=1e-9)
    tested = sum(r.tested for r in found.rounds)
    assert abs(found.accepted_share - a) < 3 * sqrt(a * (1 - a) / tested)
    each = torch.tensor(
        [len(r.tokens) for r in found.rounds if len(r.drafted) == gamma], dtype=torch.float64
    )
    wanted = (1 - a ** (gamma + 1)) / (1 - a)
    assert (each.mean() - wanted).abs() < 3 * each.std() / sqrt(len(each))
    assert predicted_speedup(a, gamma, 0.0, 1.0) == pytest.approx(wanted)
    assert (
        found.block_efficiency
        == count / len(found.rounds)
        == pytest.approx(each.mean().item(), rel=1e-2)
    )
    assert 3 not in found.tokens, "the teacher never says it"


def test_the_share_that_stays_is_the_mean_overlap_of_what_was_tested():
    """Accepted less overlap has mean 0 at every test, whatever came before."""
    teacher = llama()
    readers = TorchReader(teacher), TorchReader(noisy(teacher, 0.12))
    found = [
        speculate(*readers, prompt, 60, gamma=4, seed=i) for i, prompt in enumerate(prompts(8))
    ]
    rounds = [r for t in found for r in t.rounds]
    overlap = torch.tensor([value for r in rounds for value in r.overlap], dtype=torch.float64)
    ratio = torch.tensor([min(1, p / q) for r in rounds for p, q in zip(r.p, r.q, strict=True)])
    stayed = sum(r.accepted for r in rounds) / len(overlap)
    error = (overlap * (1 - overlap)).sum().sqrt() / len(overlap)
    print(
        f"overlap {overlap.mean():.4f}, stayed {stayed:.4f}, s.e. {error:.4f}, {len(overlap)} tests"
    )
    assert 0.3 < stayed < 0.9
    assert abs(stayed - overlap.mean()) < 3 * error
    assert abs(ratio.mean() - overlap.mean()) < 3 * error, (
        "E[min(1, p / q)] under q, by the recorded p and q"
    )


def test_a_drafter_that_is_the_teacher_is_always_right():
    teacher = llama()
    found = speculate(
        TorchReader(teacher), TorchReader(copy.deepcopy(teacher)), [1, 2], 90, gamma=5
    )
    assert found.accepted_share == 1
    assert found.acceptance == pytest.approx(1, abs=1e-5)
    assert (found.teacher_calls, found.block_efficiency) == (15, 6)
    assert found.drafter_calls == 75, (
        "one call for each drafted token, the one that closed the last round read along"
    )


@settings(max_examples=12, deadline=None)
@given(gamma=st.integers(0, 6), seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0]))
def test_rollback_is_decoding_without_a_cache(gamma, seed, temperature):
    teacher = llama().double()
    drafter = noisy(teacher, 0.12)
    more = {"gamma": gamma, "seed": seed, "temperature": temperature}
    with torch.inference_mode():
        found = speculate(TorchReader(teacher), TorchReader(drafter), [3, 1], 20, **more)
        anew = speculate(Whole(teacher), Whole(drafter), [3, 1], 20, **more)
    assert found.tokens == anew.tokens
    assert [(r.drafted, r.accepted, r.token) for r in found.rounds] == [
        (r.drafted, r.accepted, r.token) for r in anew.rounds
    ]


def test_files_draft_and_verify_as_modules_do():
    """Every mixture of onnxruntime and torch, with other texts read in between."""
    teacher = llama()
    drafter = noisy(teacher)
    written = [write_decoder.to_onnx(copy.deepcopy(m)) for m in (teacher, drafter)]
    files = [OnnxReader(Decoder(file)) for file in written]
    modules = [TorchReader(m) for m in (teacher, drafter)]
    for i, prompt in enumerate(prompts(3)):
        for temperature in (0.0, 1.0):
            wanted = speculate(*modules, prompt, 40, gamma=3, temperature=temperature, seed=i)
            assert 1.2 < wanted.block_efficiency < 4
            for pair in ((modules[0], files[1]), (files[0], modules[1]), files):
                found = speculate(*pair, prompt, 40, gamma=3, temperature=temperature, seed=i)
                assert found.tokens == wanted.tokens
                assert found.acceptance == pytest.approx(wanted.acceptance, abs=1e-4)
    with pytest.raises(DataError, match="made for 3 rows"):
        OnnxReader(Decoder(written[0], rows=3))


@pytest.mark.parametrize("length", [1, 60, 95, 96])
def test_a_text_ends_one_token_beyond_the_teachers_context(length):
    """With drafters of a context as long, shorter than the prompt or ending within the text, and a
    longer one.
    """
    teacher = llama().double()
    prompt = prompts(1, length=length)[0]
    straight = generate(TorchReader(teacher), prompt, 200, temperature=0.0)
    assert (len(straight.tokens), straight.ended) == (STEPS + 1 - length, "context")
    assert straight.teacher_calls == len(straight.tokens)
    for steps in (STEPS, 20, 70, 300):
        drafter = llama(steps=steps).double()
        drafter.load_state_dict(noisy(teacher).state_dict())
        found = speculate(
            TorchReader(teacher), TorchReader(drafter), prompt, 200, gamma=4, temperature=0.0
        )
        assert (found.tokens, found.ended) == (straight.tokens, "context")
        assert sum(len(r.drafted) for r in found.rounds) == found.drafter_calls
        assert (found.drafter_calls == 0) == (length > min(steps, STEPS - 1))


def test_a_text_ends_behind_the_token_that_ends_it_wherever_it_stands():
    teacher = llama().double()
    readers = TorchReader(teacher), after_one(teacher)
    ended = set()
    for prompt in prompts(6):
        whole = generate(readers[0], prompt, 24, temperature=0.0).tokens
        for eos in list(dict.fromkeys(whole))[:8]:
            found = speculate(*readers, prompt, 24, gamma=4, temperature=0.0, eos=eos)
            assert found.tokens == whole[: whole.index(eos) + 1]
            assert found.tokens == generate(readers[0], prompt, 24, temperature=0.0, eos=eos).tokens
            assert found.ended == "eos"
            ended.add((found.rounds[-1].token is None, found.rounds[-1].accepted > 0))
    assert {(True, True), (False, True), (False, False)} <= ended, (
        "as a draft, behind drafts, and alone"
    )
    prompt = [*prompts(1)[0], 7]
    assert len(generate(readers[0], prompt, 3, eos=7).tokens) >= 1, (
        "one that stands in the prompt does not count"
    )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_no_more_tokens_are_made_or_drafted_than_asked_for(count):
    teacher = llama()
    found = speculate(TorchReader(teacher), TorchReader(teacher), [1, 2], count, gamma=4)
    assert (len(found.tokens), found.ended) == (count, "count")
    assert sum(len(r.tokens) for r in found.rounds) == count
    assert found.teacher_calls == -(-count // 5)
    alone = speculate(TorchReader(teacher), TorchReader(teacher), [1, 2], count, gamma=0, seed=5)
    assert alone.tokens == generate(TorchReader(teacher), [1, 2], count, seed=5).tokens


def test_columns_that_only_one_side_has_are_outside_both_laws():
    teacher = llama()
    wide = llama(vocab=64)
    with torch.no_grad():
        for name, weight in noisy(teacher).state_dict().items():
            mine = wide.state_dict()[name]
            mine.fill_(5.0)[tuple(map(slice, weight.shape))] = weight
    drafter = TorchReader(wide)
    for ours, theirs in ((TorchReader(teacher), drafter), (drafter, TorchReader(teacher))):
        with pytest.raises(
            DataError, match=r"are (50|64) columns .* vocab=vocabulary.shared_tokens"
        ):
            speculate(ours, theirs, [1, 2], 10)
        found = speculate(ours, theirs, [1, 2], 90, vocab=VOCAB)
        assert max(found.tokens) < VOCAB
        assert 0.3 < found.acceptance < 1
    narrow = speculate(TorchReader(teacher), TorchReader(noisy(teacher)), [1, 2], 90, vocab=VOCAB)
    assert narrow.tokens == speculate(TorchReader(teacher), drafter, [1, 2], 90, vocab=VOCAB).tokens


def test_what_can_not_be_decoded_is_refused():
    module = llama()
    reader = TorchReader(module)
    for call in (
        lambda *a, **k: generate(reader, *a, **k),
        lambda *a, **k: speculate(reader, reader, *a, **k),
    ):
        with pytest.raises(DataError, match="no token in it"):
            call([], 5)
        with pytest.raises(DataError, match="97 tokens, but the teacher reads 96"):
            call([1] * 97, 5)
        with pytest.raises(DataError, match="ids 1 to 40, but vocab is 30"):
            call([1, 40], 5, vocab=30)
        with pytest.raises(DataError, match="vocab is 60, but the logits are 50 columns"):
            call([1, 40], 5, vocab=60)
        with pytest.raises(RecipeError, match=r"temperature is -0\.5"):
            call([1], 5, temperature=-0.5)
    with pytest.raises(RecipeError, match="gamma is -1"):
        speculate(reader, reader, [1], 5, gamma=-1)
    with pytest.raises(DataError, match="keep 0 to"):
        reader.rollback(reader.length + 1)
    with torch.no_grad():
        module.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        generate(reader, [1], 5)


def test_the_predicted_speed_up_has_its_limits():
    assert predicted_speedup(0.0, 4, 0.05, 1.5) == pytest.approx(1 / (4 * 0.05 + 1.5))
    assert predicted_speedup(1.0, 4, 0.05, 1.5) == pytest.approx(5 / (4 * 0.05 + 1.5))
    assert predicted_speedup(0.8, 4, 0.05, 1.5) == pytest.approx(
        (1 - 0.8**5) / (0.2 * (4 * 0.05 + 1.5))
    )
    assert predicted_speedup(0.7, 0, 0.3, 1.0) == 1
