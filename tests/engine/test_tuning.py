"""Tuning of a block: zeros, the guard on held-out sequences, losses that are not finite, equal bits, several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from launching import spawn
from thanos.engine import tuning_passes
from thanos.engine.distributed import SINGLE, Group, World
from thanos.engine.tuned_parameters import Masters, Tunable
from thanos.engine.tuning import Tuned, evenly, one_cycle, shuffled_batches, tune
from thanos.engine.tuning_passes import TuningPasses, Work, deterministic
from thanos.solvers.row_shards import row_range

SEQUENCES, HELD_OUT, LENGTH, WIDTH, INNER = 20, 4, 12, 16, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def block(parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """A residual block: gain, matrix with bias, activation, matrix."""
    inner = F.linear(hidden * parameters["gain"], parameters["up"], parameters["bias"])
    return hidden + F.linear(F.silu(inner), parameters["down"])


class Toy:
    """A dense block, the same block with half of its weights zero, and sequences for both."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, stored: torch.dtype | None = None, scale: float = 1.0
    ) -> None:
        draw = torch.Generator().manual_seed(5)
        dense = {
            "gain": 1 + 0.1 * torch.randn(WIDTH, generator=draw),
            "up": torch.randn(INNER, WIDTH, generator=draw) / 4,
            "bias": 0.1 * torch.randn(INNER, generator=draw),
            "down": torch.randn(WIDTH, INNER, generator=draw) / 5,
        }
        self.stored = stored or dtype
        self.dense = {name: value.to(self.stored).to(dtype) for name, value in dense.items()}
        self.values = {name: value.clone() for name, value in self.dense.items()}
        for name in ("up", "down"):
            value = self.values[name]
            value[value.abs() < value.abs().median()] = 0
        self.zeros = {name: value == 0 for name, value in self.values.items() if value.dim() > 1}
        self.dense_inputs = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=draw).to(dtype)
        self.inputs = (self.dense_inputs + 0.05 * torch.randn(self.dense_inputs.shape, generator=draw)).to(dtype)
        self.scale = scale
        self.targets = block(self.dense, self.dense_inputs) * scale
        self.rows: list[list[int]] = []

    def forward(self, parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        assert len(hidden) == len(rows)
        for name, zeros in self.zeros.items():
            if name in parameters:
                assert not parameters[name].detach()[zeros].any(), "a removed weight came back"
        return block({**self.values, **parameters}, hidden) * self.scale

    def work(self, world: World = SINGLE, **changes: Any) -> Work:
        mine = row_range(SEQUENCES, world.rank, world.size, 1)

        def read(batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches:
                positions = [mine[row] for row in batch]
                self.rows.append(positions)
                yield self.inputs[positions], self.targets[positions]

        given: dict[str, Any] = {
            "forward": self.forward,
            "tunables": [Tunable(name, value, self.stored, value.dim() > 1) for name, value in self.values.items()],
            "read": read,
            "training": range(SEQUENCES - HELD_OUT),
            "held_out": range(SEQUENCES - HELD_OUT, SEQUENCES),
            "mine": mine,
            "device": torch.device("cpu"),
        }
        return Work(**given | changes)

    def error(self, values: Mapping[str, Tensor], positions: Sequence[int]) -> float:
        """The relative error, by plain float64 sums over the block in its own dtype."""
        held = {name: value.to(self.values[name].dtype) for name, value in values.items()}
        wanted = self.targets[positions].double()
        outputs = block({**self.values, **held}, self.inputs[positions]) * self.scale
        return ((outputs.double() - wanted).square().sum() / wanted.square().sum()).item()


def run(work: Work, *, epochs: int = 6, rate: float = 0.04, seed: int = 0, world: World = SINGLE) -> Tuned:
    steps = tune(work, epochs=epochs, rate=rate, seed=seed, world=world)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


HELD = range(SEQUENCES - HELD_OUT, SEQUENCES)


# --- zeros, the guard, rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [True, False], ids=["held as stored", "held in float32"])
def test_zeros_stay_and_the_held_out_error_falls_in_the_stored_dtype(dtype: torch.dtype, held: bool) -> None:
    toy = Toy(dtype if held else torch.float32, stored=dtype)
    tuned = run(toy.work())
    record = tuned.record
    assert tuned.values.keys() == toy.values.keys()
    for name, value in tuned.values.items():
        assert value.dtype == dtype
        assert not torch.equal(value, toy.values[name].to(dtype))
        if name in toy.zeros:
            assert torch.equal(value == 0, toy.zeros[name])
    assert record.held_out_before == pytest.approx(toy.error({}, HELD), rel=1e-4)
    assert record.held_out_after == pytest.approx(toy.error(tuned.values, HELD), rel=1e-4)
    assert record.held_out_after is not None
    assert record.held_out_before is not None
    assert record.held_out_after < 0.65 * record.held_out_before
    sample = [0, 4, 8, 12]
    assert record.error_before == pytest.approx(toy.error({}, sample), rel=1e-4)
    assert record.error_after == pytest.approx(toy.error(tuned.values, sample), rel=1e-4)
    assert record.held_out_after == min(record.held_out_errors) == record.held_out_errors[record.kept_epoch - 1]
    assert (record.epochs, len(record.losses), record.reason) == (6, 6, "")
    assert record.losses[-1] < record.losses[0]
    assert record.held_out_unrounded == pytest.approx(
        record.held_out_after, rel=1e-5 if dtype == torch.float32 else 0.1
    )
    if dtype == torch.bfloat16:
        assert record.held_out_unrounded != record.held_out_after
    free = sum(value.numel() for value in toy.values.values()) - sum(int(zeros.sum()) for zeros in toy.zeros.values())
    assert record.parameters == free


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_costs_is_the_difference_to_the_weights_that_were_not_rounded(dtype: torch.dtype) -> None:
    """The oracle is the same training of the same numbers, stored in float32."""
    rounding = Toy(torch.float32, stored=dtype)
    exact = Toy(torch.float32, stored=torch.float32)
    exact.dense, exact.values, exact.zeros = rounding.dense, rounding.values, rounding.zeros
    exact.inputs, exact.targets = rounding.inputs, rounding.targets
    one, other = run(rounding.work(), epochs=1), run(exact.work(), epochs=1)
    assert one.record.kept_epoch == other.record.kept_epoch == 1
    assert all(torch.equal(one.values[name], value.to(dtype)) for name, value in other.values.items())
    assert one.record.held_out_unrounded == pytest.approx(exact.error(other.values, HELD), rel=1e-5)
    assert one.record.held_out_after == pytest.approx(exact.error(one.values, HELD), rel=1e-5)
    assert one.record.held_out_after != one.record.held_out_unrounded


@pytest.mark.parametrize("rate", [1e-9, 1e-4, 1e-2, 3.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_held_out_error_never_rises(dtype: torch.dtype, rate: float) -> None:
    toy = Toy(dtype)
    tuned = run(toy.work(), rate=rate, epochs=3)
    record = tuned.record
    before, after = toy.error({}, HELD), toy.error(tuned.values, HELD)
    assert after < before if tuned.values else after == before
    assert record.held_out_after is not None
    assert record.held_out_before is not None
    assert record.held_out_after <= record.held_out_before
    assert bool(tuned.values) == bool(record.kept_epoch) == (not record.reason)
    if rate == 1e-9 and dtype != torch.float32:  # every change is lost when it is rounded
        assert record.reason == "the held-out error did not fall"
    if rate == 1e4:
        assert not tuned.values


def test_a_good_epoch_is_kept_though_later_ones_are_worse() -> None:
    toy = Toy()
    toy.targets[: SEQUENCES - HELD_OUT] += 0.3 * torch.randn(SEQUENCES - HELD_OUT, LENGTH, WIDTH)
    tuned = run(toy.work(), rate=0.05, epochs=12)
    record = tuned.record
    assert 0 < record.kept_epoch < record.epochs == 12
    assert record.held_out_after == pytest.approx(toy.error(tuned.values, HELD), rel=1e-4)
    assert record.held_out_errors[-1] > min(record.held_out_errors)


def test_targets_that_contradict_the_held_out_ones_change_nothing() -> None:
    toy = Toy()
    toy.targets[: SEQUENCES - HELD_OUT] *= -1
    tuned = run(toy.work(), rate=0.02)
    assert tuned.values == {}
    assert tuned.record.reason == "the held-out error did not fall"
    assert tuned.record.held_out_after == tuned.record.held_out_before
    assert tuned.record.error_after == tuned.record.error_before
    assert tuned.record.held_out_unrounded is None


# --- what is minimised --------------------------------------------------------------------------------------------------


def test_the_steps_are_those_of_masked_adam_written_out() -> None:
    toy, rate, epochs = Toy(), 0.003, 2
    tuned = run(toy.work(), rate=rate, epochs=epochs, seed=3)
    assert tuned.record.kept_epoch == epochs
    theta = {name: value.double() for name, value in toy.values.items()}
    first = {name: torch.zeros_like(value) for name, value in theta.items()}
    second = {name: torch.zeros_like(value) for name, value in theta.items()}
    power = toy.targets[[0, 4, 8, 12]].double().square().mean()
    kept = torch.cat([toy.values[name][~zeros] for name, zeros in toy.zeros.items()])
    rate *= kept.double().square().mean().sqrt().item()
    draw, step = torch.Generator().manual_seed(3), 0
    for _ in range(epochs):
        for batch in shuffled_batches(range(SEQUENCES - HELD_OUT), 8, draw):
            leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
            outputs = block(leaves, toy.inputs[batch].double())
            ((outputs - toy.targets[batch].double()).square().mean() / power).backward()
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                first[name] = 0.9 * first[name] + 0.1 * leaf.grad
                second[name] = 0.95 * second[name] + 0.05 * leaf.grad**2
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                theta[name] = theta[name] - one_cycle(step, 4, rate) * mean / (square.sqrt() + 1e-8)
                if name in toy.zeros:
                    theta[name][toy.zeros[name]] = 0
            step += 1
    assert step == 4
    for name, value in tuned.values.items():
        torch.testing.assert_close(value.double(), theta[name], rtol=0, atol=2e-6)


def linear_block(scale: float = 1.0) -> Work:
    """A pruned matrix whose outputs are to be those of the dense one; weights and outputs have a scale."""
    draw = torch.Generator().manual_seed(1)
    weight = scale * torch.randn(6, WIDTH, generator=draw)
    pruned = weight.masked_fill(torch.rand(weight.shape, generator=draw) < 0.5, 0)
    inputs = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=draw)
    targets = inputs @ weight.T
    return Work(
        forward=lambda parameters, hidden, rows: hidden @ parameters.get("weight", pruned).T,
        tunables=[Tunable("weight", pruned, torch.float32, True)],
        read=lambda batches: iter([(inputs[batch], targets[batch]) for batch in batches]),
        training=range(SEQUENCES - HELD_OUT),
        held_out=range(SEQUENCES - HELD_OUT, SEQUENCES),
        mine=range(SEQUENCES),
        device=torch.device("cpu"),
    )


def test_a_rate_means_the_same_whatever_the_size_of_the_weights() -> None:
    one, other = (run(linear_block(scale), rate=0.02, epochs=3) for scale in (1.0, 1 / 64))
    assert one.record.kept_epoch
    assert other.record.losses == pytest.approx(one.record.losses, rel=1e-3)
    torch.testing.assert_close(64 * other.values["weight"], one.values["weight"], rtol=1e-3, atol=1e-4)


def test_a_linear_block_comes_near_to_its_least_squares() -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(6, WIDTH, generator=draw)
    zeros = torch.rand(weight.shape, generator=draw) < 0.5
    inputs = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=draw)
    targets = inputs @ weight.T
    pruned = weight.masked_fill(zeros, 0)
    work = Work(
        forward=lambda parameters, hidden, rows: hidden @ parameters.get("weight", pruned).T,
        tunables=[Tunable("weight", pruned, torch.float32, True)],
        read=lambda batches: ((inputs[list(rows)], targets[list(rows)]) for rows in batches),
        training=range(SEQUENCES),
        held_out=range(SEQUENCES),  # the same, so that the optimum is one and the same
        mine=range(SEQUENCES),
        device=torch.device("cpu"),
    )
    tuned = run(work, rate=0.05, epochs=60)
    flat, wanted, least = inputs.view(-1, WIDTH).double(), targets.view(-1, 6).double(), 0.0
    for row in range(6):
        kept = ~zeros[row]
        solution = torch.linalg.lstsq(flat[:, kept], wanted[:, row]).solution
        least += (flat[:, kept] @ solution - wanted[:, row]).square().sum().item()
    least /= wanted.square().sum().item()
    assert tuned.record.error_after == pytest.approx(least, rel=1e-3)
    assert tuned.record.error_after is not None
    assert tuned.record.error_after >= least * (1 - 1e-6)


def by_token(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The mean of the tokens' relative squared errors, token by token."""
    errors = []
    for row, goal in zip(outputs.reshape(-1, WIDTH), wanted.reshape(-1, WIDTH), strict=True):
        norm = sum(entry**2 for entry in goal.tolist())
        errors.append((row - goal).square().sum() / norm if norm else row.sum() * 0)
    return torch.stack(errors).mean()


def test_the_loss_by_token_and_its_gradient_are_those_of_a_reference() -> None:
    toy = Toy()
    toy.targets[:, 0] *= 100.0  # the first tokens would be all of a sum
    toy.targets[3, 1] = 0.0
    work, batch = toy.work(by_token=True), [1, 3, 6]
    masters, passes = Masters(work.tunables, (0.9, 0.95)), TuningPasses(work, SINGLE)
    measured = passes.measure({}, batch)
    loss = passes.gradients(masters, batch, toy.inputs[batch], toy.targets[batch], measured.mean_square)
    leaves = {name: value.double().requires_grad_() for name, value in toy.values.items()}
    expected = by_token(block(leaves, toy.inputs[batch].double()), toy.targets[batch].double())
    expected.backward()
    assert (loss.item(), measured.error) == (pytest.approx(expected.item()), pytest.approx(expected.item()))
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(masters.leaves[name].grad, leaf.grad.float(), rtol=1e-4, atol=1e-6)


def test_the_guard_by_token_judges_by_the_loss_by_token() -> None:
    toy = Toy()
    toy.targets[:, 0] *= 100.0
    tuned = run(toy.work(by_token=True))
    held = {name: value.to(toy.values[name].dtype) for name, value in tuned.values.items()}
    after, before = (
        by_token(block({**toy.values, **values}, toy.inputs[HELD]).double(), toy.targets[HELD].double()).item()
        for values in (held, {})
    )
    assert tuned.record.kept_epoch
    assert tuned.record.held_out_before == pytest.approx(before, rel=1e-5)
    assert tuned.record.held_out_after == pytest.approx(after, rel=1e-5)
    assert after < before
    assert run(toy.work()).record.held_out_after != pytest.approx(after, rel=0.1)


def test_a_rate_means_the_same_whatever_the_scale_of_the_outputs() -> None:
    plain, large, small = (run(Toy(scale=scale).work()) for scale in (1.0, 1024.0, 1 / 1024))
    for other in (large, small):
        for name, value in plain.values.items():
            torch.testing.assert_close(other.values[name], value, rtol=1e-4, atol=1e-5)
        assert other.record.held_out_after == pytest.approx(plain.record.held_out_after, rel=1e-3)


# --- bad numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_and_keeps_what_was_before(bad: float) -> None:
    toy = Toy()
    toy.targets[5, 3, 2] = bad  # not in the sample of training sequences that is measured
    seen, tuned = [], None
    steps = tune(toy.work(), epochs=4, rate=0.01, seed=0)
    try:
        while True:
            seen.append(next(steps))
    except StopIteration as end:
        tuned = end.value
    assert tuned is not None
    assert tuned.values == {}
    assert tuned.record.reason == "the loss was not finite in epoch 1"
    assert tuned.record.epochs == 1
    assert tuned.record.kept_epoch == 0
    assert tuned.record.held_out_after == tuned.record.held_out_before
    assert len(seen) == 2  # the steps of one epoch


def test_what_came_before_is_kept_even_after_a_good_epoch() -> None:
    toy = Toy()
    forward, calls = toy.forward, []

    def later_nan(parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        calls.append(torch.is_grad_enabled())
        outputs = forward(parameters, hidden, rows)
        return outputs * math.nan if sum(calls) > 5 else outputs

    tuned = run(toy.work(forward=later_nan), epochs=5)
    assert tuned.values == {}
    assert tuned.record.reason == "the loss was not finite in epoch 3"
    assert tuned.record.held_out_errors[0] < (tuned.record.held_out_before or 0)
    assert (tuned.record.kept_epoch, tuned.record.held_out_unrounded) == (0, None)
    assert tuned.record.held_out_after == tuned.record.held_out_before


@pytest.mark.parametrize("what", ["targets", "inputs"])
def test_nothing_is_trained_where_the_error_before_is_not_finite(what: str) -> None:
    toy = Toy()
    getattr(toy, what)[SEQUENCES - 1, 0, 0] = math.nan
    tuned = run(toy.work())
    assert tuned.values == {}
    assert "not finite" in tuned.record.reason
    assert tuned.record.epochs == 0


def test_nothing_is_trained_without_need_or_means() -> None:
    toy = Toy()
    toy.targets = block(toy.values, toy.inputs)
    assert run(toy.work()).record.reason == "the block's outputs equal the wanted ones already"
    toy = Toy()
    assert run(toy.work(tunables=[])).record.reason == "there is nothing to tune"
    assert run(toy.work(training=range(0))).record.reason == "too few sequences"
    assert run(toy.work(held_out=range(0))).record.reason == "too few sequences"
    toy.targets.zero_()
    assert "all zero" in run(toy.work()).record.reason
    assert run(Toy().work(), epochs=0).values == {}


# --- equal bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    first = run(Toy(dtype).work())
    torch.manual_seed(99)  # nothing is drawn from the global generator
    second = run(Toy(dtype).work())
    assert first.record == second.record
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.values)
    assert run(Toy(dtype).work(), seed=1).record != first.record


def test_the_block_and_its_inputs_are_not_changed() -> None:
    toy, like = Toy(), Toy()
    run(toy.work())
    assert all(torch.equal(toy.values[name], like.values[name]) for name in toy.values)
    assert torch.equal(toy.inputs, like.inputs)
    assert torch.equal(toy.targets, like.targets)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_the_size_of_a_pass_changes_no_more_than_the_last_bits(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(Toy().work())
    monkeypatch.setitem(tuning_passes.BATCH_TOKENS, "cpu", parts * LENGTH)
    divided = run(Toy().work())
    for name, value in whole.values.items():
        torch.testing.assert_close(divided.values[name], value, rtol=1e-4, atol=1e-5)


def test_a_pass_without_room_is_run_again_in_halves() -> None:
    toy, sizes = Toy(), []
    forward = toy.forward

    def narrow(parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(rows))
            if len(rows) > 2:
                raise torch.OutOfMemoryError("no room")
        return forward(parameters, hidden, rows)

    tuned, whole = run(toy.work(forward=narrow)), run(Toy().work())
    assert sizes[:6] == [8, 4, 2, 2, 2, 2]
    assert set(sizes[2:]) == {2}
    for name, value in whole.values.items():
        torch.testing.assert_close(tuned.values[name], value, rtol=1e-4, atol=1e-5)


def test_an_error_of_memory_is_raised_where_one_sequence_has_no_room() -> None:
    toy = Toy()

    def never(parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return toy.forward(parameters, hidden, rows)

    with pytest.raises(torch.OutOfMemoryError):
        run(toy.work(forward=never))


def test_the_deterministic_mode_is_given_back() -> None:
    with deterministic(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), deterministic(torch.device("cpu")):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


# --- progress, order, rate ----------------------------------------------------------------------------------------------


def test_progress_counts_sequences_and_tells_the_losses() -> None:
    seen = list(tune(Toy().work(), epochs=3, rate=0.01, seed=0))
    assert [step.done for step in seen] == [8, 16, 16, 24, 32, 32, 40, 48, 48], "two steps and a measurement an epoch"
    assert {step.total for step in seen} == {48}
    assert [step.loss is None for step in seen] == [True, True, *[False] * 7]
    assert seen[0].held_out > seen[2].held_out > seen[5].held_out
    record = run(Toy().work(), epochs=3, rate=0.01).record
    assert (seen[-1].loss, seen[-1].held_out) == (record.losses[-1], record.held_out_after), "the last is the result"


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 17, 30, 120, 127, 1001])
def test_batches_hold_every_sequence_once(count: int) -> None:
    draw = torch.Generator().manual_seed(2)
    first, second = (shuffled_batches(range(100, 100 + count), 8, draw) for _ in range(2))
    for batches in (first, second):
        assert sorted(position for batch in batches for position in batch) == list(range(100, 100 + count))
        assert len(batches) == -(-count // 8)
        assert 1 <= min(map(len, batches)) <= max(map(len, batches)) <= 8
    if count > 16:
        assert first != second
    again = shuffled_batches(range(100, 100 + count), 8, torch.Generator().manual_seed(2))
    assert again == first


def test_a_batch_gives_every_process_about_the_same_work() -> None:
    batches = shuffled_batches(range(120), 8, torch.Generator().manual_seed(0))
    for size in (2, 4):
        for batch in batches:
            counts = [sum(position in row_range(128, rank, size, 1) for position in batch) for rank in range(size)]
            assert max(counts) <= 8 // size + 1


def test_the_rate_rises_and_falls() -> None:
    rates = [one_cycle(step, 100, 2.0) for step in range(100)]
    highest = rates.index(max(rates))
    assert highest in (29, 30)
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert max(rates) == pytest.approx(2.0, rel=1e-2)
    assert 0 < rates[-1] < 0.001 < rates[0] < 0.1
    assert 0 < one_cycle(0, 1, 2.0) <= 2.0


def test_a_sample_is_spread_evenly() -> None:
    assert evenly(range(120), 8) == [0, 15, 30, 45, 60, 75, 90, 105]
    assert evenly([3, 5], 8) == [3, 5]
    assert evenly([], 3) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_size_is_that_of_the_matrices_unless_all_their_entries_are_zero(dtype: torch.dtype) -> None:
    gain = Tunable("gain", torch.tensor([2.0, -2.0]), torch.float32, False)

    def size(*matrices: Tensor) -> float:
        tunables = [Tunable(f"weight{i}", one.to(dtype), dtype, True) for i, one in enumerate(matrices)]
        return Masters([*tunables, gain], (0.9, 0.95)).size

    assert size(torch.zeros(2, 2), torch.tensor([[300.0, 0.0], [0.0, 400.0]])) == pytest.approx(125000**0.5)
    assert size(torch.zeros(2, 2)) == size() == 2.0


def test_masters_clear_a_weight_that_became_nan() -> None:
    value = torch.tensor([[1.0, 0.0]])
    masters = Masters([Tunable("weight", value, torch.float32, True)], (0.9, 0.95))
    masters.gradient.fill_(math.nan)
    masters.step(0.1)
    assert masters.leaves["weight"].isnan().tolist() == [[True, False]]
    assert masters.rounded()["weight"][0, 1] == 0


# --- several processes --------------------------------------------------------------------------------------------------


def tune_in_group(dtype: torch.dtype, bad: bool) -> tuple[Tuned, list[list[int]]]:
    world, toy = Group(), Toy(dtype)
    if bad:
        toy.targets[5, 3, 2] = math.nan
    return run(toy.work(world), world=world), toy.rows


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_take_the_steps_of_one(size: int, tmp_path: Path) -> None:
    results = spawn(tune_in_group, size, tmp_path, torch.float32, False)
    alone = run(Toy().work())
    for tuned, rows in results:
        assert tuned.record == results[0][0].record
        for name, value in alone.values.items():
            assert torch.equal(tuned.values[name], results[0][0].values[name])
            torch.testing.assert_close(tuned.values[name], value, rtol=1e-4, atol=1e-5)
        assert tuned.record.held_out_after == pytest.approx(alone.record.held_out_after, rel=1e-4)
        assert rows
    held = {position for _, rows in results for batch in rows for position in batch}
    assert held == set(range(SEQUENCES))


def test_a_loss_that_is_not_finite_ends_it_in_every_process(tmp_path: Path) -> None:
    for tuned, _ in spawn(tune_in_group, 2, tmp_path, torch.float32, True):
        assert tuned.values == {}
        assert tuned.record.reason == "the loss was not finite in epoch 1"


# --- CUDA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_products_run_in_bfloat16_over_float32_masters(dtype: torch.dtype) -> None:
    toy, seen = Toy(dtype), []
    for part in (toy.values, toy.zeros):
        part.update({name: value.cuda() for name, value in part.items()})
    toy.inputs, toy.targets = toy.inputs.cuda(), toy.targets.cuda()

    def forward(parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((F.linear(hidden, parameters["up"]).dtype, parameters["up"].dtype, hidden.dtype))
        return toy.forward(parameters, hidden, rows)

    tuned = run(toy.work(forward=forward, device=torch.device("cuda")))
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    assert tuned.record.kept_epoch
    assert tuned.record.held_out_after == pytest.approx(toy.error(tuned.values, HELD), rel=1e-3)
    on_cpu = run(Toy(dtype).work())
    assert tuned.record.held_out_after == pytest.approx(on_cpu.record.held_out_after, rel=0.05)
    assert all(torch.equal(tuned.values[name] == 0, zeros) for name, zeros in toy.zeros.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_size_of_a_pass_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for free in (1 << 40, 0):
        toy = Toy()
        for part in (toy.values, toy.zeros):
            part.update({name: value.cuda() for name, value in part.items()})
        toy.inputs, toy.targets = toy.inputs.cuda(), toy.targets.cuda()
        monkeypatch.setattr(tuning_passes, "free_device_bytes", lambda device, free=free: free)
        rows_seen: list[int] = []

        def forward(
            parameters: Mapping[str, Tensor],
            hidden: Tensor,
            rows: Sequence[int],
            toy: Toy = toy,
            rows_seen: list[int] = rows_seen,
        ) -> Tensor:
            if torch.is_grad_enabled():
                rows_seen.append(len(rows))
            return toy.forward(parameters, hidden, rows)

        run(toy.work(forward=forward, device=torch.device("cuda")), epochs=1)
        sizes.append(rows_seen)
    assert sizes[0] == [1, 8, 8]
    assert sizes[1] == [1] * 17
