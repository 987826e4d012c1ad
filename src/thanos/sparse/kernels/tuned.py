"""The launch of each CUDA kernel by device and size of the matrix: from ``tuned.json``, or by a rule.

``benchmarks/packed.py --tune`` measures and writes the file.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from thanos.sparse.tiles import SIDE

FEW, MANY = "few", "many"
"""Names of the kernels: ``few`` computes one row per lane, ``many`` uses tensor cores."""

MOST_MATRICES = 4
"""Largest number of matrices in one launch."""

FILE = Path(__file__).parent / "tuned.json"

TOKENS_OF_MANY = (8, 16, 32)
"""Sizes of a pass of ``many``, in tokens. A larger one needs more registers."""

_NO_STRIP = (1 << 31) - 1
"""The value in ``Plan.firsts`` for each matrix that a launch has fewer than :data:`MOST_MATRICES`."""

_NEAR = 1.0
"""A measured launch is used for matrices whose rows and columns differ from the measured ones by at most a factor of 2 to this
power."""

_WARPS_OF_DEVICE = 2048
"""Number of warps that fill a large device; the rule uses it."""


class Launch(NamedTuple):
    """The division of one kernel's work. The order of the sums depends on it, and so do the result's last bits.

    Attributes:
        flight: number of tiles that a warp loads at the same time.
        splits: number of parts of the columns, at most 8; each part is processed by one block of a cluster.
        warps: number of warps of a block, at most 16 (``few``) or 8 (``many``).
    """

    flight: int
    splits: int
    warps: int


class Plan(NamedTuple):
    """The sizes of one launch.

    Attributes:
        at_once: number of tokens of a pass.
        grid: numbers of blocks: strips, parts of the columns, passes.
        block: numbers of threads in each dimension.
        firsts: first strip of each matrix of the launch, from the second on.
    """

    at_once: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    firsts: tuple[int, ...]


@cache
def plan(tokens: int, rows: tuple[int, ...], family: str, launch: Launch, most: int, *, clusters: bool) -> Plan:
    """Return the sizes of a launch.

    Args:
        tokens: number of tokens, at least 1.
        rows: number of rows of each matrix; at most :data:`MOST_MATRICES` matrices.
        family: :data:`FEW` or :data:`MANY`.
        launch: how the work is divided.
        most: most tokens of a pass of :data:`MANY`, one of :data:`TOKENS_OF_MANY`.
        clusters: whether blocks of the device can share their sums; if not, columns are not split.
    """
    if family == FEW:
        at_once = min(4, 1 << (tokens - 1).bit_length())
    else:
        at_once = min(most, next((size for size in TOKENS_OF_MANY if tokens <= size), most))
    strips = [-(-count // SIDE) for count in rows]
    firsts = tuple(sum(strips[:index]) if index < len(strips) else _NO_STRIP for index in range(1, MOST_MATRICES))
    grid = (sum(strips), launch.splits if clusters else 1, -(-tokens // at_once))
    return Plan(at_once, grid, (launch.warps * SIDE, 1, 1), firsts)


class Settings(NamedTuple):
    """Settings for all matrices on a device.

    Attributes:
        few_tokens: largest number of tokens for which ``few`` runs.
        most_tokens: largest number of tokens for which kernels read the packed matrix; above, the matrix is expanded and a
            library multiplies.
        parts: most parts of a matrix that is expanded. Each is multiplied while the next one is expanded.
        pass_tokens: most tokens of a pass of ``many``.
    """

    few_tokens: int = 4
    most_tokens: int = 32
    parts: int = 1
    pass_tokens: int = 16


def kind_of(n: int) -> str:
    """Return the kind of a matrix whose tiles have ``n`` values per row; 0 stands for ``bitmap``.

    The kernels of one kind need similar numbers of registers.
    """
    return "bitmap" if n == 0 else "to16" if n <= 16 else "to31"


@cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@cache
def device_settings(device: str) -> Settings:
    """Return the settings of a device by its name."""
    return Settings(**_table().get(device, {}).get("settings", {}))


@cache
def launch_for(device: str, family: str, n: int, units: int, strips: int, tiles: int) -> Launch:
    """Return the launch of a kernel. It depends on the matrix and the device, not on the number of tokens.

    Args:
        device: name of the device.
        family: :data:`FEW` or :data:`MANY`.
        n: number of values per row of each tile; 0 for ``bitmap``.
        units: mean number of units of 64 bytes of a tile; it decides between measured sizes that are equally near.
        strips: number of strips of 32 rows of all matrices of the launch.
        tiles: number of tiles of a strip.
    """

    def distance(row: dict[str, Any]) -> tuple[float, int]:
        rows, columns = row["size"]
        apart = max(abs(math.log2(SIDE * strips / rows)), abs(math.log2(SIDE * tiles / columns)))
        return apart, abs(row["units"] - units)

    rows = [
        row
        for row in _table().get(device, {}).get("launches", [])
        if (row["family"], row["kind"]) == (family, kind_of(n)) and distance(row)[0] <= _NEAR
    ]
    if rows:
        best = min(rows, key=distance)
        return Launch(best["flight"], best["splits"], best["warps"])
    return _by_rule(family, n, strips, tiles)


def _by_rule(family: str, n: int, strips: int, tiles: int) -> Launch:
    most = 16 if family == FEW else 8
    splits = 1
    while splits < 8 and strips * splits * most < _WARPS_OF_DEVICE and tiles >= 4 * most * splits:
        splits *= 2
    warps = 4
    while warps < most and warps * 4 * splits <= tiles:
        warps *= 2
    return Launch(2 if 0 < n <= 16 else 1, splits, warps)
