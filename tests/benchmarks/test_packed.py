"""The benchmarks of packed products and of decoding: what they draw, time and write. Times are invented where they decide."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers import ROOT
from sparse_matrices import save_pruned
from thanos.export.pack import pack
from thanos.sparse.formats import decode
from thanos.sparse.kernels import tuned
from thanos.sparse.kernels.tuned import FEW, MANY, Settings


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("packed", "packed_weights", "decode", "same_tokens"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("pattern", ["16:32", "60 %"])
@pytest.mark.parametrize("rows", [96, 2048])
def test_the_packed_weights_are_the_dense_ones(pattern, rows):
    from packed_weights import drawn_rows, weights

    dense, packed, words = weights((rows, 64), pattern, torch.bfloat16, "cpu")
    assert len(dense) == len(words) == 48
    assert torch.equal(decode(packed), dense[0])
    assert packed.spec.rows == rows
    assert len(dense[0][drawn_rows(rows) :].unique()) == (0 if rows == 96 else len(dense[0].unique()))
    share = (dense[0] == 0).double().mean()
    assert share == (0.5 if pattern == "16:32" else pytest.approx(0.6, abs=0.02))


def test_every_call_of_a_round_is_timed_in_turn():
    from packed import rounds

    called: list[list[int]] = [[], []]
    took = rounds([called[0].append, called[1].append], 3, "cpu", 2)
    assert len(took) == 2
    assert all(one > 0 for one in took)
    for indices in called:
        assert indices == [0, 1, 2] * (len(indices) // 3)


def test_the_command_writes_a_line_for_each_shape_pattern_and_number_of_tokens(tmp_path, monkeypatch, capsys):
    import packed

    file = tmp_path / "results.jsonl"
    words = ["packed.py", "--device", "cpu", "--shapes", "64x64,96x32", "--tokens", "1,20", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--patterns", "16:32,70 %", "--results", str(file)])
    assert packed.main() == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["shape"], row["pattern"], row["tokens"]) for row in rows] == [
        (shape, pattern, tokens) for shape in ("64x64", "96x32") for pattern in ("16:32", "70 %") for tokens in (1, 20)
    ]
    for row in rows:
        assert row["error"] < 0.01
        assert row["machine"]["versions"]["torch"] == torch.__version__
    assert rows[0]["bytes"] == 0.5625
    assert capsys.readouterr().out.count("\n") == 9


def test_tuning_writes_launches_that_the_kernels_then_use(tmp_path, monkeypatch, capsys):
    import packed

    monkeypatch.setattr(packed, "SETTINGS_SHAPE", (64, 128))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new GPU")
    timed: list[int] = []

    def rounds(works: list[Any], count: int, device: str, repeats: int) -> list[float]:
        del count, device, repeats
        timed.append(len(works))
        pairs = timed.count(2)
        if len(works) != 2:
            return [float(len(works) - index) for index in range(len(works))]  # the last one is the fastest
        return [1.0, 2.0] if pairs in (1, 2, 5) else [2.0, 1.0]  # few to 2 tokens, passes of 32, many to 32

    monkeypatch.setattr(packed, "rounds", rounds)
    file = tmp_path / "tuned.json"
    file.write_text('{"another": {"settings": {}, "launches": []}}')
    words = ["packed.py", "--device", "cpu", "--shapes", "32x64", "--tune", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    assert packed.main() == 0
    table = json.loads(file.read_text())
    assert table.keys() == {"another", "a new GPU"}
    assert table["a new GPU"]["settings"] == {"few_tokens": 2, "most_tokens": 32, "parts": 4, "pass_tokens": 32}
    assert table["a new GPU"]["measured"]["torch"] == torch.__version__
    assert len(table["a new GPU"]["launches"]) == 2 * 4 * 2  # sizes, patterns, kernels
    monkeypatch.setattr(tuned, "FILE", file)
    for function in (tuned._table, tuned.device_settings, tuned.launch_for):
        function.cache_clear()
    try:
        assert tuned.device_settings("a new GPU") == Settings(2, 32, 4, 32)
        for family, n in ((FEW, 16), (FEW, 0), (MANY, 16), (MANY, 0)):
            assert tuned.launch_for("a new GPU", family, n, 18, 1, 2) == list(packed.launches(family, n))[-1]
    finally:
        for function in (tuned._table, tuned.device_settings, tuned.launch_for):
            function.cache_clear()
    assert "slowest_us" in capsys.readouterr().out


def test_decoding_of_random_weights_runs_both_models_with_joint_layers(tmp_path, monkeypatch, capsys):
    import decode as benchmark

    from thanos.bench.synthetic import Shape

    shape = Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, blocks=2, vocabulary=128)
    monkeypatch.setitem(benchmark.SHAPES, "tiny", shape)
    file = tmp_path / "results.jsonl"
    words = ["decode.py", "--shape", "tiny", "--device", "cpu", "--context", "5", "--new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--results", str(file)])
    assert benchmark.main() == 0
    dense, packed = (json.loads(line) for line in file.read_text().splitlines())
    assert (dense["packed_layers"], packed["packed_layers"]) == (0, 14)
    linear = 2 * 2 * 64 * (2 * 64 + 2 * 32 + 3 * 96)  # bytes
    assert dense["weight_bytes"] - packed["weight_bytes"] == linear * 7 // 16
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["joint_groups"] == 2 * 2
    assert 0.5 < summary["bytes"] < 1


def test_greedy_tokens_are_compared_with_float32(tmp_path, monkeypatch, capsys):
    import same_tokens

    save_pruned(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed", least_weights=1)
    monkeypatch.setenv("THANOS_UNPACK", "never")
    file = tmp_path / "results.jsonl"
    words = ["same_tokens.py", str(tmp_path / "dense"), str(tmp_path / "packed"), "--new-tokens", "4", "--prompts", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--results", str(file)])
    assert same_tokens.main() == 0
    row, summary = (json.loads(line) for line in file.read_text().splitlines())
    assert (summary["packed_layers"], summary["dtype"], summary["tokens"]) == (21, "bfloat16", 4)
    assert 0 < row["distance_dense"] < 0.1
    assert 0 < row["distance_packed"] < 0.1
    assert row["same"] == 4 or row["gap"] < 0.1
    assert capsys.readouterr().out.count("\n") >= 2
