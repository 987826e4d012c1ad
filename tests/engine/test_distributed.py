"""Several processes against one: the same bits from the same statistics, the same model but for a sum's order, and an end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import thanos
from helpers import prose, save_tiny
from launching import error_lines, spawn, torchrun
from oracles import BLOCKWISE, METHODS
from thanos.calibration.accumulators import Gram
from thanos.calibration.statistics import InputGroup, Need, empty_group
from thanos.cli import run as command
from thanos.engine.distributed import SINGLE, Group
from thanos.engine.joining import my_device
from thanos.engine.rank_zero import SharedWriter
from thanos.errors import RecipeError, UserError
from thanos.model.layers import LinearLayer
from thanos.recipe import LayerRecipe
from thanos.run.report import PruningReport
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.retarget import DenseTarget
from thanos.solvers.row_shards import row_range

SAMPLES, LENGTH = 10, 32  # no multiple of 4


# --- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 33, 100, 128, 4096])
def test_shares_are_contiguous_whole_units_and_cover_everything(count: int, unit: int, size: int) -> None:
    shares = [row_range(count, rank, size, unit) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(count))
    filled = [len(share) for share in shares if len(share)]
    assert all(length >= min(unit, count) for length in filled)  # never a sliver
    assert all(share.start % unit == 0 for share in shares if len(share))
    if filled:
        assert max(filled) - min(len(share) for share in shares) < 2 * unit


def test_a_single_process_shares_with_nobody() -> None:
    counts, rows = torch.tensor([3, 4]), torch.randn(5, 2)
    assert (SINGLE.rank, SINGLE.size) == (0, 1)
    assert SINGLE.sum_(counts) is counts
    assert SINGLE.before(counts).tolist() == [0, 0]
    assert SINGLE.gather(rows, 5) is rows
    assert SINGLE.share(7) == range(7)
    assert SINGLE.from_first(lambda: "made") == "made"
    SINGLE.check_equal({"anything": object()})


def test_a_numbered_gpu_cannot_be_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert my_device(torch.device("cuda:1")) == torch.device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert my_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"cuda:1 is one GPU.*give --device cuda"):
        my_device(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=r"process number 2 on a machine with 1 GPUs.*--nproc-per-node"):
        my_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert my_device(torch.device("cuda")) == torch.device("cuda:1")


# --- processes without a model ------------------------------------------------------------------------------------------


def recipes() -> list[LayerRecipe]:
    """Every method and pattern, with and without outlier rows, and both scopes."""
    sparsities = {"unstructured": 0.5, "2:4": None, "columns": 0.3}
    return [
        LayerRecipe(
            method=method,
            pattern=pattern,
            sparsity=sparsities[pattern],
            outlier_rows=alpha,
            keep_budget=keep,
            block_size=32 if method in BLOCKWISE else None,
            scope=scope,
        )
        for method, pattern, (alpha, keep), scope in product(
            METHODS,
            sparsities,
            ((0.0, False), (0.1, False), (0.1, True)),
            (None, "layer", "row"),
        )
        if scope is None or pattern == "unstructured"
    ]


def problems() -> list[tuple[Tensor, Tensor]]:
    """Weights and Hessians: rows for all, rows for some only, zeros that were there before, ties, 16 bits."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for rows, columns, zeros, dtype in (
        (200, 96, 0.0, torch.float32),
        (33, 64, 0.2, torch.float32),
        (16, 40, 0.0, torch.bfloat16),
    ):
        weight = torch.randn(rows, columns, generator=generator)
        weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
        weight[: rows // 2, :8] = 0.25  # equal scores, of which the earlier rows' go first
        inputs = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(
            columns, columns, generator=generator
        )
        inputs[:, 3] = 0
        found.append((weight.to(dtype), inputs.T @ inputs))
    return found


def solve_all(row_shards: Any) -> list[tuple[Any, ...]]:
    return [
        (
            result.weight,
            result.kept,
            result.outliers,
            result.halved,
            result.error_before_compensation,
            result.error_after_compensation,
        )
        for weight, hessian in problems()
        for result in (
            prune_layer(weight, InputStatistics(hessian), recipe, row_shards=row_shards) for recipe in recipes()
        )
    ]


def repair_all(row_shards: Any) -> list[tuple[Any, ...]]:
    """Every method with a dense target and a refit."""
    found = []
    for (weight, hessian), (method, pattern, alpha) in product(
        problems(), product(METHODS, ("unstructured", "columns"), (0.0, 0.1))
    ):
        generator = torch.Generator().manual_seed(8)
        columns = weight.shape[1]
        cross = hessian @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator))
        residual = 0.1 * torch.randn(weight.shape, generator=generator) @ hessian
        recipe = LayerRecipe(method=method, pattern=pattern, sparsity=0.4, outlier_rows=alpha, refit=4)
        target = DenseTarget(0.5, cross, residual)
        result = prune_layer(weight, InputStatistics(hessian), recipe, row_shards=row_shards, retarget=target)
        found.append((result.weight, result.kept, result.errors, result.residuals, result.target_changes))
    return found


def repair_in_group() -> list[tuple[Any, ...]]:
    return repair_all(Group())


@pytest.mark.slow
def test_dense_targets_and_refits_of_every_process_have_the_bits_of_one(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = repair_all(SINGLE)
    torch.set_num_threads(threads)
    for results in spawn(repair_in_group, 3, tmp_path):
        for one, other in zip(expected, results, strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def solve_in_group() -> list[tuple[Any, ...]]:
    return solve_all(Group())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_with_the_statistics_given_every_process_has_the_bits_of_one(size: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = solve_all(SINGLE)
    torch.set_num_threads(threads)
    labels = [f"{recipe} on {tuple(w.shape)}" for w, _ in problems() for recipe in recipes()]
    for results in spawn(solve_in_group, size, tmp_path):
        for label, one, other in zip(labels, expected, results, strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, label


def _layer(name: str, columns: int) -> LinearLayer:
    return LinearLayer(name, nn.Linear(columns, 3), 0, False)


def merge_statistics() -> Any:
    """Rank r has r + 1 tokens of the shared input; an expert gets tokens in rank 1 alone; one is too big for a bucket."""
    group = Group()
    layers = [_layer("q", 4), _layer("k", 4), _layer("expert.gate", 6), _layer("expert.up", 6), _layer("wide", 3000)]
    ones = torch.ones(group.rank + 1, 4)
    groups = [InputGroup(layers[:2], (Gram(ones.T @ ones, len(ones)),), tokens=len(ones))]
    if group.rank == 1:
        groups.append(InputGroup(layers[2:4], (Gram(torch.full((6, 6), 5.0), 9),), tokens=9))
    groups.append(InputGroup(layers[4:], (Gram(torch.full((3000, 3000), 2.0), 1),), tokens=1))
    merged = group.merge(groups, layers, lambda members: empty_group(members, torch.device("cpu")))
    norms = empty_group([_layer("norms", 512)], torch.device("cpu"), Need.NORMS)
    norms.add(torch.ones(len(ones), 512))
    norms.add(torch.ones(len(ones), 512), sampling=False)
    (summed,) = group.merge(
        [norms], norms.layers, lambda members: empty_group(members, torch.device("cpu"), Need.NORMS)
    )
    assert summed.norms is not None
    assert summed.gram is not None
    assert (summed.tokens, summed.norms.tokens, summed.gram.tokens) == (12, 12, 6)
    assert (summed.norms.squared_norms().tolist(), summed.hessian.unique().tolist()) == ([12.0] * 512, [6.0])
    found = {tuple(layer.name for layer in g.layers): (g.tokens, g.hessian.unique().tolist()) for g in merged}
    parts = {
        dtype: group.gather(torch.full((len(row_range(37, group.rank, group.size)), 3), group.rank).to(dtype), 37)
        for dtype in (torch.float64, torch.bfloat16, torch.bool)
    }
    before = group.before(torch.tensor([group.rank + 1, 10]))
    shared = SharedWriter(None, group)
    shared.write("anything", torch.zeros(2))  # goes nowhere
    return found, parts, before.tolist(), group.from_first(lambda: {"made by": group.rank})


@pytest.mark.slow
def test_statistics_add_up_and_rows_come_together(tmp_path: Path) -> None:
    results = spawn(merge_statistics, 3, tmp_path)
    for rank, (found, parts, before, made) in enumerate(results):
        assert found == {("q", "k"): (6, [6.0]), ("expert.gate", "expert.up"): (9, [5.0]), ("wide",): (3, [6.0])}
        for dtype, rows in parts.items():
            assert rows.dtype == dtype
            owners = torch.tensor([[r] * 3 for r in range(3) for _ in row_range(37, r, 3)])
            assert torch.equal(rows, owners.to(dtype))
        assert before == [sum(range(1, rank + 1)), 10 * rank]
        assert made == {"made by": 0}


def disagree() -> str:
    group = Group()
    try:
        group.check_equal({"the recipe's seed": 0, "torch": 2 if group.rank == 1 else 1})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_processes_that_would_do_different_work_are_told_apart(tmp_path: Path) -> None:
    messages = spawn(disagree, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "torch is 1 in rank 0, but 2 in rank 1" in messages[0]


# --- the command ----------------------------------------------------------------------------------------------------------


def flags(text: Path) -> list[Any]:
    return ["--calibration", text, "--samples", SAMPLES, "--sequence-length", LENGTH, "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(4000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, tuple[Path, Path, PruningReport]]:
    """Models, what one process makes of them, and its reports."""
    base = tmp_path_factory.mktemp("alone")
    recipe = thanos.Recipe(calibration=str(text), samples=SAMPLES, sequence_length=LENGTH, device="cpu")
    found = {}
    for architecture in ("llama", "olmoe"):
        dense = save_tiny(base / architecture, architecture)
        found[architecture] = (
            dense,
            base / f"{architecture}-pruned",
            thanos.prune(dense, base / f"{architecture}-pruned", recipe),
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "units",
    [["neurons", "--effort", "max", "--tune", "1"], ["width", "--sparsity", "0.3"], ["blocks", "--effort", "high"]],
)
def test_many_processes_cut_like_one(
    units: list[str], alone: dict[str, tuple[Path, Path, PruningReport]], text: Path, tmp_path: Path
) -> None:
    dense, _, _ = alone["llama"]
    given = ["--sparsity", "0.34"] if units[0] == "blocks" else ["--multiple-of", "8"]
    words = ["prune", str(dense), *map(str, flags(text)), "--pattern", *units, *given]
    assert command([*words, str(tmp_path / "one")]) == 0
    run = torchrun(2, ["-m", "thanos"], [*words, tmp_path / "two"])
    assert run.returncode == 0, run.stderr
    one, two = (PruningReport.read(tmp_path / name / "pruning.json") for name in ("one", "two"))
    assert one.cut["units"] == two.cut["units"]
    assert one.cut.get("dropped_blocks") == two.cut.get("dropped_blocks")
    assert [layer.removed_units for layer in one.layers] == [layer.removed_units for layer in two.layers]
    expected, written = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in expected.items():
        torch.testing.assert_close(written[name], weight, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "size"), [("llama", 2), ("llama", 4), ("olmoe", 2), ("olmoe", 4)])
def test_many_processes_prune_like_one(
    architecture: str, size: int, alone: dict[str, tuple[Path, Path, PruningReport]], text: Path, tmp_path: Path
) -> None:
    dense, one, report = alone[architecture]
    out = tmp_path / "out"
    run = torchrun(size, ["-m", "thanos"], ["prune", dense, out, *flags(text)])
    assert run.returncode == 0, run.stderr
    assert len(re.findall("written to", run.stdout)) == 1  # one process speaks
    assert "error" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    expected, written = load_file(one / "model.safetensors"), load_file(out / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        differ = int(((weight == 0) != (written[name] == 0)).sum())
        assert differ <= 2, name  # a score that lies on the threshold may fall on either side of it
        if not differ:
            torch.testing.assert_close(written[name], weight, rtol=1e-3, atol=1e-4)
    found = PruningReport.from_dict(json.loads((out / "pruning.json").read_text()))
    assert found.recipe == report.recipe
    assert found.calibration == report.calibration
    assert [(layer.name, layer.tokens) for layer in found.layers] == [
        (layer.name, layer.tokens) for layer in report.layers
    ]
    assert found.warnings == report.warnings
    assert found.totals["zeros_all"] == report.totals["zeros_all"]

    perplexities = [
        thanos.evaluate(folder, text=str(text), sequence_length=64, device="cpu").perplexity for folder in (one, out)
    ]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)


@pytest.mark.slow
def test_a_complete_run_given_again_ends_all_processes_well_and_writes_nothing(
    alone: dict[str, tuple[Path, Path, PruningReport]], text: Path
) -> None:
    dense, one, _ = alone["llama"]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in one.iterdir()}
    beside = sorted(one.parent.iterdir())
    again = torchrun(2, ["-m", "thanos"], ["prune", dense, one, *flags(text), "--resume"])
    assert again.returncode == 0, again.stderr
    assert "error" not in again.stderr
    assert len(re.findall("already complete", again.stdout)) == 1
    other = torchrun(2, ["-m", "thanos"], ["prune", dense, one, *flags(text), "--resume", "--seed", "5"])
    assert other.returncode != 0
    (line,) = error_lines(other)
    assert "seed 0 → 5" in line
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in one.iterdir()} == before
    assert sorted(one.parent.iterdir()) == beside


_THREADS = """
import os, sys
import thanos, torch.distributed
from thanos.engine.stages.prune import PruneStage
work = PruneStage.__call__

def failing(self, context):
    if os.environ["RANK"] == os.environ.get("FAILS") and context.index == 1:
        raise ValueError("no luck")
    yield from work(self, context)

PruneStage.__call__ = failing
recipe = thanos.Recipe(calibration=sys.argv[3], samples=4, sequence_length=32, device="cpu")
try:
    thanos.prune(sys.argv[1], sys.argv[2], recipe)
    ended = "done"
except Exception as error:
    ended = type(error).__name__
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
gloo = sorted(name for name in names if "gloo" in name)
sys.stdout.write(f"rank {os.environ['RANK']} {ended} {gloo} {torch.distributed.is_initialized()}\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("fails", "ends"), [("", ("done", "done")), ("1", ("LostPeerError", "ValueError"))])
def test_no_thread_of_the_group_is_left_when_python_ends(
    fails: str, ends: tuple[str, str], tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    """One that is left may abort the process after its work is done."""
    if fails and torch.__version__.startswith(("2.11", "2.12")):
        pytest.skip("gloo of this torch keeps its threads after an abort; the command leaves by os._exit there")
    script = tmp_path / "threads.py"
    script.write_text(_THREADS)
    run = torchrun(2, [str(script)], [tiny_llama, tmp_path / "out", text], FAILS=fails)
    assert run.returncode == 0, run.stderr
    said = sorted(line for line in run.stdout.splitlines() if line.startswith("rank"))
    assert said == [f"rank {rank} {how} [] False" for rank, how in enumerate(ends)], run.stderr


_DIES = """
import os, signal
from thanos.engine.stages.prune import PruneStage
from thanos.cli import main
solve = PruneStage._solve

def dying(self, context, *arguments):
    if os.environ["RANK"] == os.environ["DIES"] and context.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from solve(self, context, *arguments)

PruneStage._solve = dying
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dies", "then"), [(2, 1, 1), (4, 0, 2)])
def test_a_process_that_dies_ends_all_with_one_line_and_another_number_goes_on(
    size: int, dies: int, then: int, alone: dict[str, tuple[Path, Path, PruningReport]], text: Path, tmp_path: Path
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(_DIES)
    out = tmp_path / "out"
    run = torchrun(size, [str(script)], ["prune", alone["llama"][0], out, *flags(text)], DIES=str(dies))
    assert run.returncode != 0
    (line,) = error_lines(run)
    assert "another process" in line or "another of its processes" in line
    assert "--resume" in line
    assert not out.exists()
    assert len((tmp_path / ".out.partial/journal.jsonl").read_text().splitlines()) == 1  # the first block is not lost

    dense, one, report = alone["llama"]
    again = ["prune", dense, out, *flags(text), "--resume"]
    if then == 1:
        run = subprocess.run(
            [sys.executable, "-m", "thanos", *map(str, again)], capture_output=True, text=True, check=False
        )
    else:
        run = torchrun(then, ["-m", "thanos"], again)
    assert run.returncode == 0, run.stderr
    found = PruningReport.from_dict(json.loads((out / "pruning.json").read_text()))
    assert [layer.name for layer in found.layers] == [layer.name for layer in report.layers]
    assert any(f"processes {size} → {then}" in line for line in found.warnings)
    expected, written = load_file(one / "model.safetensors"), load_file(out / "model.safetensors")
    for name, weight in expected.items():
        assert int(((weight == 0) != (written[name] == 0)).sum()) <= 2, name
    perplexities = [
        thanos.evaluate(folder, text=str(text), sequence_length=64, device="cpu").perplexity for folder in (one, out)
    ]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--samples", "1"], r"2 processes cannot share 1 calibration sequences; raise --samples"),
        (["--sparsity", "3"], r"sparsity must be a number"),
        (["--pattern", "2:5"], r"2:5|multiple of 5"),
    ],
)
def test_a_mistake_is_told_once(
    changes: list[str], message: str, alone: dict[str, tuple[Path, Path, PruningReport]], text: Path, tmp_path: Path
) -> None:
    run = torchrun(2, ["-m", "thanos"], ["prune", alone["llama"][0], tmp_path / "out", *flags(text), *changes])
    assert run.returncode != 0
    (line,) = error_lines(run)
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()
