"""The recipe: invalid values, writing and reading TOML, and settings per layer."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracles
from thanos import Recipe, registry
from thanos.errors import RecipeError
from thanos.recipe import LayerRecipe, Override, matches
from thanos.recipe.repair import Repair, held_out_of
from thanos.registry import method_names

# --- defaults ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_are_documented():
    recipe = Recipe()
    assert dataclasses.asdict(recipe) == {
        "method": "thanos",
        "pattern": "unstructured",
        "sparsity": None,
        "outlier_rows": 0.0,
        "keep_budget": False,
        "block_size": None,
        "damping": 0.01,
        "scope": None,
        "effort": "fast",
        "dense_target": None,
        "sequential": None,
        "refit": None,
        "tune": None,
        "calibration": "c4",
        "samples": 128,
        "sequence_length": 2048,
        "generate": 0,
        "segment": 256,
        "prompt": 32,
        "prompts": None,
        "seed": 0,
        "device": "auto",
        "dtype": "auto",
        "output_dtype": "auto",
        "targets": (),
        "skip": (),
        "overrides": (),
        "measure_error": None,
        "allocation": "uniform",
        "multiple_of": None,
        "head_unit": None,
        "held_out": None,
        "tune_rate": 8e-3,
        "tune_loss": "block",
        "trust_remote_code": False,
    }
    assert recipe.resolved_sparsity == 0.5
    assert method_names() == ("thanos", "sparsegpt", "wanda", "magnitude", "admm")


@pytest.mark.parametrize(
    ("pattern", "sparsity", "resolved"),
    [
        ("unstructured", None, 0.5),
        ("columns", None, 0.5),
        ("unstructured", 0.7, 0.7),
        ("unstructured", 0, 0),
        ("columns", 0.0, 0.0),
        ("2:4", None, 0.5),
        ("1:4", None, 0.75),
        ("1:4", 0.75, 0.75),
        ("2:3", 1 / 3, 1 / 3),
        ("2:3", 0.3333333333, 1 / 3),
    ],
)
def test_sparsity_follows_from_the_pattern_or_is_the_setting(pattern, sparsity, resolved):
    assert LayerRecipe(pattern=pattern, sparsity=sparsity).resolved_sparsity == pytest.approx(resolved)


@pytest.mark.parametrize(
    ("method", "pattern", "block_size", "resolved"),
    [
        ("thanos", "unstructured", None, 128),
        ("thanos", "columns", None, 128),
        ("thanos", "2:4", None, 512),
        ("thanos", "3:7", None, 511),
        ("thanos", "1:600", None, 600),
        ("sparsegpt", "unstructured", None, 128),
        ("sparsegpt", "2:4", None, 128),
        ("sparsegpt", "3:7", None, 126),
        ("thanos", "2:4", 64, 64),
        ("sparsegpt", "unstructured", 1, 1),
    ],
)
def test_block_size_is_the_papers_unless_given(method, pattern, block_size, resolved):
    recipe = LayerRecipe(method=method, pattern=pattern, block_size=block_size)
    assert recipe.resolved_block_size == resolved


def test_recipes_are_frozen_and_take_names_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().sparsity = 0.3
    with pytest.raises(TypeError):
        Recipe("thanos")


def test_the_pattern_is_written_in_one_way():
    assert Recipe(pattern="02:04") == Recipe(pattern="2:4")


# --- bad values -------------------------------------------------------------------------------------------------------

BAD_LAYER_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"method": "Thanos"}, r"method 'Thanos' is unknown; choose one of thanos, sparsegpt, wanda, magnitude, admm"),
    ({"method": ""}, r"method '' is unknown"),
    ({"method": None}, r"method None is unknown"),
    ({"method": ["thanos"]}, r"method \['thanos'\] is unknown"),
    ({"pattern": "2-4"}, r"pattern '2-4' is unknown"),
    ({"pattern": None}, r"pattern None is unknown"),
    ({"pattern": "4:4"}, r"pattern 4:4 is impossible"),
    ({"pattern": "0:4"}, r"pattern 0:4 is impossible"),
    *[({"sparsity": v}, r"sparsity must be a number, at least 0 and below 1; got") for v in (1, 1.0, 1.5, -1e-9)],
    *[({"sparsity": v}, r"sparsity must be a number") for v in (math.nan, math.inf, -math.inf, "0.5", True, [0.5])],
    *[({"outlier_rows": v}, r"outlier_rows must be a number, at least 0 and below 1; got") for v in (1, 1.0, -0.1)],
    *[({"outlier_rows": v}, r"outlier_rows must be a number") for v in (math.nan, math.inf, "0", False, None)],
    *[({"damping": v}, r"damping must be a number, at least 0; got") for v in (-1e-9, math.nan, math.inf, "1", None)],
    *[({"block_size": v}, r"block_size must be a whole number, at least 1") for v in (0, -4, 128.0, "128")],
    ({"block_size": True}, r"block_size must be a whole number"),
    ({"pattern": "2:4", "block_size": 130}, r"block_size 130 would cut a group of pattern 2:4 in two.*multiple of 4"),
    ({"pattern": "2:4", "block_size": 2}, r"block_size 2 would cut a group"),
    ({"pattern": "2:4", "sparsity": 0.6}, r"sparsity 0.6 contradicts pattern 2:4, which removes 0.5"),
    ({"pattern": "2:4", "sparsity": 0.0}, r"sparsity 0.0 contradicts pattern 2:4"),
    ({"pattern": "1:4", "sparsity": 0.25}, r"sparsity 0.25 contradicts pattern 1:4, which removes 0.75"),
    ({"sparsity": 0.9, "outlier_rows": 0.1}, r"sparsity 0.9 is impossible with outlier_rows 0.1.*lower one"),
    ({"sparsity": 0.95, "outlier_rows": 0.1}, r"hold only 0.9 of the weights"),
    ({"keep_budget": 1}, r"keep_budget must be true or false; got 1"),
    ({"keep_budget": True, "outlier_rows": 0.1, "pattern": "1:4"}, r"1:4 keeps an odd number.*leave keep_budget out"),
    ({"keep_budget": True, "outlier_rows": 0.34, "pattern": "2:4"}, r"outlier_rows 0.34.*at most 0.3333; lower"),
    ({"keep_budget": True, "outlier_rows": 0.15, "pattern": "2:8"}, r"at most 0.1429"),
    ({"outlier_rows": 0.5}, r"sparsity 0.5 is impossible with outlier_rows 0.5"),
    ({"pattern": "columns", "outlier_rows": 0.6}, r"impossible with outlier_rows 0.6"),
    *[({"effort": v}, r"effort .* is unknown; choose one of fast, high, max") for v in ("High", "", 1, None)],
    *[
        ({"dense_target": v}, r"dense_target must be auto or a number, at least 0 and at most 1; got")
        for v in (-0.1, 1.01, math.nan, math.inf, True, "automatic", "", "2", [0.5])
    ],
    *[({"sequential": v}, r"sequential must be true, false or left out; got") for v in (0, 1, "true")],
    *[
        ({name: v}, rf"{name} must be a whole number, at least 0")
        for name in ("refit", "tune")
        for v in (-1, 1.0, "3", True)
    ],
]

BAD_RUN_VALUES: list[tuple[dict[str, Any], str]] = [
    *[({"samples": v}, r"samples must be a whole number, at least 1; got") for v in (0, -1, 1.0, "8", True, None)],
    *[({"sequence_length": v}, r"sequence_length must be a whole number, at least 2") for v in (1, 0, 2.5, None)],
    *[({"seed": v}, r"seed must be a whole number, at least 0") for v in (-1, 0.0, "0", False)],
    (
        {"samples": 10**20},
        r"100000000000000000000 \(samples\) calibration sequences of 2048 tokens .* fewer or shorter",
    ),
    *[({"segment": v, "generate": 8}, r"segment must be a whole number, at least 2; got") for v in (1, 2.0, "8", True)],
    *[({"prompt": v, "generate": 8}, r"prompt must be a whole number, at least 0; got") for v in (-1, 2.0, None)],
    (
        {"segment": 100},
        r"segment 100 has no meaning without generated sequences; leave segment out, or set generate above 0",
    ),
    ({"prompt": 0}, r"prompt 0 has no meaning without generated sequences"),
    ({"prompts": "a.txt"}, r"prompts a\.txt has no meaning without generated sequences; leave prompts out"),
    *[
        ({"prompts": v, "generate": 8}, r"prompts must be the name of a text file, or left out; got")
        for v in ("", 4, ["a"])
    ],
    (
        {"prompts": "a.txt", "prompt": 4, "generate": 8},
        r"prompt 4 has no meaning with prompts \(a\.txt\), which are used whole; leave one of them out",
    ),
    ({"generate": 10**20}, r"128 \(samples\) \+ 100000000000000000000 \(generate\) calibration sequences"),
    ({"sequence_length": 10**20}, "more than any machine can hold"),
    *[({"dtype": v}, r"dtype .* is unknown; choose one of auto, float32, bfloat16, float16") for v in ("fp16", "", 16)],
    *[({"calibration": v}, r"calibration must be a name; got") for v in ("", None, 4, ["c4"])],
    (
        {"calibration": ["a.txt", "b.txt"]},
        r"got \['a\.txt', 'b\.txt'\]; separate several texts by commas in one string",
    ),
    *[({"device": v}, r"device must be a name; got") for v in ("", None, 0)],
    *[({"targets": v}, r"targets must be a list of globs over layer names") for v in ("*.q_proj", [""], [1], 5, None)],
    *[({"skip": v}, r"skip must be a list of globs over layer names") for v in ("*.q_proj", ("a", ""), True, 1.5)],
    *[({"held_out": v}, r"held_out must be a whole number, at least 1; got") for v in (0, -1, 2.0, "2", True)],
    *[
        ({"tune_rate": v}, r"tune_rate must be a number, above 0 and at most 1; got")
        for v in (0, -1e-4, 1.5, math.nan, "1", None)
    ],
    *[({"tune_loss": v}, r"tune_loss must be block or token; got") for v in ("tokens", "", None, 1)],
    *[
        ({"samples": 1, **v}, r"of 1 calibration sequence, 1 would be held out")
        for v in ({"effort": "high"}, {"tune": 1})
    ],
    ({"samples": 4, "held_out": 4, "effort": "max"}, r"of 4 calibration sequences, 4 would be held out"),
    (
        {"samples": 1, "overrides": (Override(match="*", settings={"dense_target": "auto"}),)},
        r"of 1 calibration sequence, 1 would be held out",
    ),
    *[({"trust_remote_code": v}, r"trust_remote_code") for v in ("false", "no", 1, None)],
    ({"overrides": (Override(match="*", settings={"sparsity": 2}),)}, r"sparsity must be a number"),
    ({"overrides": (Override(match="*", settings={"pattern": "4:2"}),)}, r"pattern 4:2 is impossible"),
    ({"pattern": "2:4", "overrides": (Override(match="*", settings={"sparsity": 0.6}),)}, r"contradicts pattern 2:4"),
]


def label(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, dict) else ""


@pytest.mark.parametrize(("values", "match"), BAD_LAYER_VALUES, ids=label)
def test_bad_settings_of_a_layer_are_refused(values, match):
    for build in (LayerRecipe, Recipe):
        with pytest.raises(RecipeError, match=match) as caught:
            build(**values)
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=match):
        Recipe(overrides=(Override(match="*.q_proj", settings=values),))


@pytest.mark.parametrize(("values", "match"), BAD_RUN_VALUES, ids=label)
def test_bad_settings_of_a_run_are_refused(values, match):
    with pytest.raises(RecipeError, match=match):
        Recipe(**values)


def test_good_extremes_are_taken():
    Recipe(sparsity=0, outlier_rows=0, damping=0, block_size=1, samples=1, sequence_length=2, seed=2**40)
    Recipe(sparsity=0.999999, damping=10)
    Recipe(sparsity=0.0, outlier_rows=0.999)
    Recipe(pattern="1:4", keep_budget=True)  # without outlier rows there is nothing to make up for
    Recipe(pattern="2:4", outlier_rows=1 / 3, keep_budget=True)
    Recipe(pattern="2:4", outlier_rows=0.9)  # the pattern's share is of the rows that are pruned
    assert Recipe(targets=["a", "b"], skip=["c"]).targets == ("a", "b")


def test_changes_are_checked_again():
    recipe = Recipe(pattern="2:4")
    assert recipe.replace(method="wanda").method == "wanda"
    with pytest.raises(RecipeError, match="contradicts pattern 2:4"):
        recipe.replace(sparsity=0.7)


# --- overrides --------------------------------------------------------------------------------------------------------


def test_without_overrides_every_layer_gets_the_recipe():
    recipe = Recipe(method="sparsegpt", sparsity=0.3, damping=0.1, block_size=64, outlier_rows=0.05)
    expected = LayerRecipe(method="sparsegpt", sparsity=0.3, damping=0.1, block_size=64, outlier_rows=0.05)
    assert recipe.for_layer("anything") == expected


def test_later_overrides_win_setting_by_setting():
    recipe = Recipe(
        sparsity=0.5,
        overrides=(
            Override(match="*.down_proj", settings={"sparsity": 0.3, "method": "wanda"}),
            Override(match="model.layers.0.*", settings={"sparsity": 0.2}),
            Override(match="*.q_proj", skip=True),
        ),
    )
    assert recipe.for_layer("model.layers.1.mlp.up_proj") == LayerRecipe(sparsity=0.5)
    assert recipe.for_layer("model.layers.1.mlp.down_proj") == LayerRecipe(sparsity=0.3, method="wanda")
    assert recipe.for_layer("model.layers.0.mlp.down_proj") == LayerRecipe(sparsity=0.2, method="wanda")
    assert recipe.for_layer("model.layers.0.mlp.up_proj") == LayerRecipe(sparsity=0.2)
    assert recipe.for_layer("model.layers.0.self_attn.q_proj") is None
    assert recipe.for_layer("model.layers.10.mlp.up_proj") == LayerRecipe(sparsity=0.5)


def test_a_later_match_takes_a_skip_back():
    overrides = (Override(match="*.q_proj", skip=True), Override(match="layers.3.*", settings={"sparsity": 0.1}))
    recipe = Recipe(overrides=overrides)
    assert recipe.for_layer("layers.2.q_proj") is None
    assert recipe.for_layer("layers.3.q_proj") == LayerRecipe(sparsity=0.1)


def test_a_sparsity_belongs_to_the_pattern_it_was_given_for():
    recipe = Recipe(sparsity=0.7, block_size=6, overrides=(Override(match="a", settings={"pattern": "2:4"}),))
    layer = recipe.for_layer("a")
    assert layer == LayerRecipe(pattern="2:4")
    assert layer is not None
    assert layer.resolved_block_size == 512
    recipe = Recipe(pattern="2:4", sparsity=0.5, overrides=(Override(match="a", settings={"pattern": "unstructured"}),))
    assert recipe.for_layer("a") == LayerRecipe()
    recipe = Recipe(
        sparsity=0.2,
        block_size=6,
        overrides=(
            Override(match="a", settings={"pattern": "columns"}),
            Override(match="b", settings={"pattern": "columns", "sparsity": 0.3, "block_size": 5}),
            Override(match="c", settings={"pattern": "unstructured"}),
        ),
    )
    assert recipe.for_layer("a") == LayerRecipe(pattern="columns")
    assert recipe.for_layer("b") == LayerRecipe(pattern="columns", sparsity=0.3, block_size=5)
    assert recipe.for_layer("c") == LayerRecipe(sparsity=0.2, block_size=6)
    among = (Override(match="*", settings={"pattern": "columns", "sparsity": 0.2}),)
    recipe = Recipe(sparsity=0.7, overrides=(*among, Override(match="a", settings={"pattern": "unstructured"})))
    assert (recipe.for_layer("a"), recipe.for_layer("b")) == (
        LayerRecipe(),
        LayerRecipe(pattern="columns", sparsity=0.2),
    )
    recipe = Recipe(overrides=(*among, Override(match="a", settings={"pattern": "2:4"})))
    assert recipe.for_layer("a") == LayerRecipe(pattern="2:4")
    recipe = Recipe(pattern="2:4", block_size=64, overrides=(Override(match="a", settings={"pattern": "02:04"}),))
    assert recipe.for_layer("a") == LayerRecipe(pattern="2:4", block_size=64)


@pytest.mark.parametrize("repair", [{"effort": "high"}, {"refit": 5}, {"dense_target": 0.5}])
def test_a_repair_uses_the_damping_of_any_method(repair: dict[str, Any]) -> None:
    assert LayerRecipe(method="wanda", damping=0.2, **repair).damping == 0.2
    assert LayerRecipe(method="thanos", damping=0.2, **repair).by("wanda").damping == 0.2
    assert LayerRecipe(method="thanos", damping=0.2).by("wanda").damping == 0.01
    other = Override(match="a", settings={"method": "magnitude"})
    recipe = Recipe(damping=0.2, overrides=(other,), **repair)
    assert recipe.for_layer("a").damping == recipe.for_layer("b").damping == 0.2
    assert Recipe.from_dict(recipe.to_dict(), stored=True) == recipe
    alone = Recipe(method="wanda", overrides=(Override(match="a", settings={**repair, "damping": 0.2}),))
    assert alone.for_layer("a").damping == 0.2
    assert Recipe.from_dict(alone.to_dict(), stored=True) == alone
    assert "damping" not in Recipe(method="wanda", damping=0.2, **repair).suited({"method": "magnitude"})
    off = {"effort": "high", "refit": 0, "dense_target": 0}
    with pytest.raises(RecipeError, match="method wanda does not use damping"):
        LayerRecipe(method="wanda", damping=0.2, **off)


def test_a_setting_that_the_method_does_not_use_is_refused():
    for method in ("wanda", "magnitude"):
        for name, value in (("block_size", 64), ("damping", 3.0)):
            setting: dict[str, Any] = {name: value}
            with pytest.raises(
                RecipeError, match=rf"method {method} does not use {name}; leave it out \(it uses pattern, sp"
            ):
                LayerRecipe(method=method, **setting)
            with pytest.raises(RecipeError, match=f"method {method} does not use {name}"):
                Recipe(method=method, **setting)
            with pytest.raises(RecipeError, match=f"method {method} does not use {name} in the override of 'a'"):
                Recipe(overrides=(Override(match="a", settings={"method": method, **setting}),))
            with pytest.raises(RecipeError, match=f"{name} in the override of 'a'"):
                Recipe(method=method, overrides=(Override(match="a", settings=setting),))
        # A default is no setting.
        assert LayerRecipe(method=method, damping=0.01, block_size=None) == LayerRecipe(method=method)


def test_settings_of_some_methods_stand_beside_others_in_one_recipe():
    by_wanda = Override(match="a", settings={"method": "wanda"})
    recipe = Recipe(block_size=64, damping=0.1, overrides=(by_wanda,))
    assert recipe.for_layer("a") == LayerRecipe(method="wanda")
    assert recipe.for_layer("b") == LayerRecipe(block_size=64, damping=0.1)
    by_thanos = Override(match="a", settings={"method": "thanos"})
    recipe = Recipe(method="wanda", damping=0.1, overrides=(by_thanos,))
    assert recipe.for_layer("a") == LayerRecipe(damping=0.1)
    assert recipe.for_layer("b") == LayerRecipe(method="wanda")
    among = (by_thanos, Override(match="b", settings={"block_size": 8}))
    recipe = Recipe(method="wanda", overrides=among)
    assert recipe.for_layer("b") == LayerRecipe(method="wanda")
    assert recipe.suited({"method": "magnitude"}) == {"method": "magnitude"}
    assert Recipe(block_size=64, damping=0.1).replace(**Recipe(block_size=64).suited({"method": "wanda"})) == Recipe(
        method="wanda"
    )


def test_a_bad_value_in_an_override_is_refused_though_the_recipes_own_method_would_ignore_it():
    among = (Override(match="a", settings={"method": "thanos"}), Override(match="b", settings={"damping": -1.0}))
    with pytest.raises(RecipeError, match="damping must be a number"):
        Recipe(method="wanda", overrides=among)


def test_recipes_that_earlier_versions_stored_are_still_read():
    stored = Recipe(method="wanda").to_dict() | {"damping": 3.0, "block_size": 64}
    stored["override"] = [{"match": "a", "damping": 2.0}, {"match": "b", "method": "magnitude", "block_size": 8}]
    with pytest.raises(RecipeError, match="wanda"):
        Recipe.from_dict(stored)
    recipe = Recipe.from_dict(stored, stored=True)
    assert recipe.for_layer("x") == recipe.for_layer("a") == LayerRecipe(method="wanda")
    assert recipe.for_layer("b") == LayerRecipe(method="magnitude")
    by_thanos = Recipe(damping=0.5, overrides=(Override(match="a", settings={"method": "wanda"}),))
    assert Recipe.from_dict(by_thanos.to_dict(), stored=True) == by_thanos


def test_overrides_that_contradict_each_other_are_refused_for_the_layers_that_both_match():
    overrides = (
        Override(match="*.q_proj", settings={"pattern": "2:4"}),
        Override(match="layers.0.*", settings={"sparsity": 0.3}),
    )
    recipe = Recipe(overrides=overrides)
    assert recipe.for_layer("layers.1.q_proj") == LayerRecipe(pattern="2:4")
    assert recipe.for_layer("layers.0.k_proj") == LayerRecipe(sparsity=0.3)
    with pytest.raises(RecipeError, match=r"sparsity 0\.3 contradicts pattern 2:4"):
        recipe.for_layer("layers.0.q_proj")


def test_a_recipe_with_overrides_is_not_changed_by_resolving_them():
    recipe = Recipe(overrides=(Override(match="*", settings={"sparsity": 0.3}),))
    before = recipe.to_toml()
    recipe.for_layer("a")
    recipe.for_layer("b")
    assert recipe.to_toml() == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"match": ""}, "an override needs match"),
        ({"match": None}, "an override needs match"),
        ({"match": 3}, "an override needs match"),
        ({"match": "a", "skip": "yes"}, "skip in the override of 'a' must be true or false"),
        ({"match": "a", "settings": {"samples": 3}}, "override of 'a' has unknown settings samples; allowed are skip"),
        ({"match": "a", "settings": {"x": 3, "b": 1}}, "unknown settings b, x"),
    ],
)
def test_malformed_overrides_are_refused(arguments, match):
    with pytest.raises(RecipeError, match=match):
        Override(**arguments)


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        ("self_attn.*", "model.layers.0.self_attn.k_proj", True),
        ("*.q_proj", "q_proj", False),
        ("model.layers.1.*", "model.layers.10.mlp", False),
        ("model.layers.?.mlp", "model.layers.3.mlp", True),
        ("layers.[0-3].*", "model.layers.2.mlp.up_proj", True),
        ("layers.[0-3].*", "model.layers.4.mlp.up_proj", False),
        ("Q_PROJ", "a.q_proj", False),
        ("*", "anything.at.all", True),
    ],
)
def test_globs_match_whole_names_or_their_ends(glob, name, expected):
    assert matches(name, glob) is expected


# --- repair -----------------------------------------------------------------------------------------------------------

OFF = Repair(dense_target=0.0, sequential=False, refit=0, tune=0)
HIGH = Repair(dense_target="auto", sequential=True, refit=20, tune=0)
MAX = dataclasses.replace(HIGH, tune=10)


def test_an_effort_sets_the_parts_that_are_not_given():
    assert [Recipe(effort=name).repair for name in ("fast", "high", "max")] == [OFF, HIGH, MAX]
    assert Recipe(effort="max", tune=0).repair == HIGH
    assert Recipe(effort="high", sequential=False, dense_target=0, refit=0).repair == OFF
    assert Recipe(refit=3).repair == dataclasses.replace(OFF, refit=3)
    assert Recipe(dense_target="0.25").repair == dataclasses.replace(OFF, dense_target=0.25)


@pytest.mark.parametrize(
    ("repair", "retargets", "stream", "holds_out", "gram"),
    [
        (OFF, False, False, False, False),
        (dataclasses.replace(OFF, sequential=True), False, False, False, False),
        (dataclasses.replace(OFF, refit=1), False, False, False, True),
        (dataclasses.replace(OFF, dense_target=1.0), True, True, False, True),
        (dataclasses.replace(OFF, tune=1), False, True, True, False),
        (HIGH, True, True, True, True),
    ],
)
def test_each_part_says_what_it_needs(repair, retargets, stream, holds_out, gram):
    assert (repair.retargets, repair.needs_dense_stream, repair.holds_out) == (retargets, stream, holds_out)
    assert repair.needs_gram == gram


def test_an_override_changes_the_repair_of_its_layers_alone():
    recipe = Recipe(
        effort="max",
        overrides=(
            Override(match="*.down_proj", settings={"dense_target": 0.5, "refit": 0}),
            Override(match="model.layers.0.*", settings={"effort": "fast", "sequential": True}),
        ),
    )
    found = {name: recipe.for_layer(f"model.layers.{name}").repair for name in ("1.mlp.up_proj", "1.mlp.down_proj")}
    assert found == {"1.mlp.up_proj": MAX, "1.mlp.down_proj": dataclasses.replace(MAX, dense_target=0.5, refit=0)}
    assert recipe.for_layer("model.layers.0.mlp.up_proj").repair == dataclasses.replace(OFF, sequential=True)
    # The later override's effort sets every part, also what the earlier one set.
    assert recipe.for_layer("model.layers.0.mlp.down_proj").repair == dataclasses.replace(OFF, sequential=True)
    assert recipe.holds_out
    assert not Recipe(dense_target=0.5, refit=2, sequential=True).holds_out


GIVEN = {"dense_target": 0.5, "sequential": False, "refit": 3, "tune": 4, "scope": "layer"}


@pytest.mark.parametrize("effort", registry.effort_names())
@pytest.mark.parametrize("own", [{}, {"tune": 2}, {"scope": "row", "refit": 0}])
def test_an_effort_of_an_override_sets_every_part_that_the_override_does_not(effort: str, own: dict[str, Any]) -> None:
    """As a recipe of its own would, whatever the recipe itself sets."""
    override = Override(match="a", settings={"effort": effort, **own})
    recipe = Recipe(**GIVEN, overrides=(override,))
    alone = Recipe(effort=effort, **own)
    for name in ("repair", "resolved_scope"):
        assert getattr(recipe.for_layer("a"), name) == getattr(alone, name)
        assert getattr(recipe.for_layer("b"), name) == getattr(Recipe(**GIVEN), name)
    # So does an effort that changes a recipe: that of the command line, beside a file.
    changed = Recipe(**GIVEN).suited({"effort": effort, **own})
    assert Recipe(**GIVEN).replace(**changed).repair == alone.repair


def test_what_a_new_effort_no_longer_uses_is_reset():
    base = Recipe(method="wanda", effort="max", held_out=3, tune_rate=0.1, tune_loss="token", damping=0.2)
    fast = base.replace(**base.suited({"effort": "fast"}))
    assert fast == Recipe(method="wanda")
    high = base.replace(**base.suited({"effort": "high"}))
    assert (high.held_out, high.tune_rate, high.damping) == (3, Recipe().tune_rate, 0.2)
    assert high.tune_loss == Recipe().tune_loss
    with pytest.raises(RecipeError, match="no layer uses held_out"):
        base.replace(**base.suited({"effort": "fast", "held_out": 4}))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"held_out": 2}, "held_out"),
        ({"held_out": 2, "dense_target": 0.5, "refit": 5, "sequential": True}, "held_out"),
        ({"held_out": 2, "effort": "max", "tune": 0, "dense_target": 0}, "held_out"),
        ({"tune_rate": 0.1}, "tune_rate"),
        ({"tune_rate": 0.1, "effort": "high"}, "tune_rate"),
        ({"tune_loss": "token", "effort": "high"}, "tune_loss"),
        ({"tune_rate": 0.1, "overrides": (Override(match="a", skip=True, settings={"tune": 1}),)}, "tune_rate"),
    ],
)
def test_settings_of_a_run_that_no_layer_uses_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(RecipeError, match=f"no layer uses {name}"):
        Recipe(**settings)
    stored = {k: v for k, v in settings.items() if k != "overrides"}
    assert getattr(Recipe.from_dict(stored, stored=True), name) == getattr(Recipe(), name)


@pytest.mark.parametrize("where", ["recipe", "override"])
@pytest.mark.parametrize(
    ("repair", "settings"),
    [
        ({"tune": 1}, {"held_out": 2, "tune_rate": 0.1, "tune_loss": "token"}),
        ({"dense_target": "auto"}, {"held_out": 2}),
    ],
)
def test_settings_that_a_layer_uses_are_kept(repair: dict[str, Any], settings: dict[str, Any], where: str) -> None:
    by = repair if where == "recipe" else {"overrides": (Override(match="a", settings=repair),)}
    recipe = Recipe(**by, **settings)
    assert {name: getattr(recipe, name) for name in settings} == settings
    assert Recipe.from_dict(recipe.to_dict(), stored=True) == recipe


def test_a_recipe_without_repair_is_written_as_before():
    """Files of versions without these settings, and the comparison with an interrupted run, have no such names."""
    names = {"effort", "dense_target", "sequential", "refit", "tune", "held_out", "tune_rate", "tune_loss"}
    assert not names & set(Recipe().to_dict())
    given = Recipe(effort="high", sequential=False, held_out=3)
    assert {name: given.to_dict()[name] for name in names & set(given.to_dict())} == {
        "effort": "high", "sequential": False, "held_out": 3,
    }  # fmt: skip
    assert Recipe.from_dict({**Recipe().to_dict()}, stored=True).repair == OFF


@pytest.mark.parametrize(("samples", "held_out", "expected"), [(128, None, 8), (2, None, 1), (40, None, 2), (5, 4, 4)])
def test_a_sixteenth_of_the_sequences_is_held_out(samples, held_out, expected):
    assert held_out_of(samples, held_out) == expected


# --- TOML -------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SHARES = st.floats(0, 0.49, allow_nan=False)


@st.composite
def layer_settings(draw: st.DrawFn) -> dict[str, Any]:
    pattern = draw(st.sampled_from(["unstructured", "columns", "2:4", "1:8"]))
    values: dict[str, Any] = {
        "method": draw(st.sampled_from(method_names())),
        "pattern": pattern,
        "outlier_rows": draw(SHARES),
        "keep_budget": draw(st.booleans()) and pattern in ("unstructured", "columns"),
        "damping": draw(st.floats(0, 1e6) | st.integers(0, 3)),
        "block_size": draw(st.none() | st.integers(1, 64).map(lambda number: 8 * number)),
    }
    if ":" not in pattern:
        values["sparsity"] = draw(st.floats(0, 0.5))
    return oracles.used(**values)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    def overrides() -> Override:
        chosen = {k: v for k, v in draw(layer_settings()).items() if v is not None}
        return Override(match=draw(TEXT), skip=draw(st.booleans()), settings=chosen)

    samples = draw(st.integers(1, 10**9))
    repaired = Recipe(
        **draw(layer_settings()),
        calibration=draw(TEXT),
        samples=samples,
        sequence_length=draw(st.integers(2, 10**6)),
        seed=draw(st.integers(0, 2**63)),
        device=draw(TEXT),
        dtype=draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"])),
        effort=draw(st.sampled_from(registry.effort_names())) if samples > 1 else "fast",
        dense_target=draw(st.none() | st.floats(0, 1) | (st.just("auto") if samples > 1 else st.none())),
        sequential=draw(st.none() | st.booleans()),
        refit=draw(st.none() | st.integers(0, 50)),
        tune=draw(st.none() | st.integers(0, 50)) if samples > 1 else None,
        targets=tuple(draw(st.lists(TEXT, max_size=3))),
        skip=tuple(draw(st.lists(TEXT, max_size=3))),
        overrides=tuple(overrides() for _ in range(draw(st.integers(0, 2)))),
        trust_remote_code=draw(st.booleans()),
    )
    tuned = any(one.tune for one in repaired.repairs)
    rate = draw(st.floats(1e-6, 1)) if tuned else repaired.tune_rate
    loss = draw(st.sampled_from(["block", "token"])) if tuned else repaired.tune_loss
    held_out = draw(st.none() | st.integers(1, samples - 1)) if repaired.holds_out else None
    return repaired.replace(held_out=held_out, tune_rate=rate, tune_loss=loss)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(recipe=recipes())
def test_toml_there_and_back_gives_the_same_recipe(recipe):
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(recipe=recipes())
def test_plain_values_there_and_back_through_json_give_the_same_recipe(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    "text", ["🦙", "a\x7fb", 'quote " and \\', "tab\tnewline\nnul\x00", "日本語", "\u2028", "= # [x]", "\U0010ffff"]
)
def test_awkward_names_survive_toml(text):
    recipe = Recipe(calibration=text, targets=(text, "*"), overrides=(Override(match=text, skip=True),))
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_uses_the_names_of_the_options(tmp_path):
    path = written(
        tmp_path,
        """
        method = "sparsegpt"
        pattern = "columns"
        sparsity = 0.3
        outlier-rows = 0.1   # as on the command line
        sequence_length = 64 # or as in Python
        targets = ["*.mlp.*"]

        [[override]]
        match = "*.down_proj"
        block-size = 32

        [[override]]
        match = "*.layers.0.*"
        skip = true
        """,
    )
    recipe = Recipe.from_toml(path)
    assert recipe == Recipe(
        method="sparsegpt",
        pattern="columns",
        sparsity=0.3,
        outlier_rows=0.1,
        sequence_length=64,
        targets=("*.mlp.*",),
        overrides=(
            Override(match="*.down_proj", settings={"block_size": 32}),
            Override(match="*.layers.0.*", skip=True),
        ),
    )
    assert Recipe.from_toml(written(tmp_path, recipe.to_toml())) == recipe
    assert Recipe.from_toml(str(path)) == recipe


def test_an_empty_file_is_the_default_recipe(tmp_path):
    assert Recipe.from_toml(written(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sparsty = 0.5", "unknown settings: sparsty; allowed are allocation, block_size, calibration"),
        ("[thanos]\nsparsity = 0.5", "unknown settings: thanos"),
        ("overrides = []", "unknown settings: overrides"),
        ("sparsity = 2", "sparsity must be a number"),
        ("sparsity = nan", "sparsity must be a number"),
        ('sparsity = "0.5"', "sparsity must be a number"),
        ("samples = 12.5", "samples must be a whole number"),
        ('pattern = "2:4"\nsparsity = 0.6', "contradicts pattern 2:4"),
        ('targets = "*.q_proj"', r"targets must be a list of globs, for example \[\"\*.q_proj\"\]"),
        ('skip = "q_proj"', "skip must be a list of globs"),
        ("targets = 5", "targets must be a list of globs"),
        ("skip = true", "skip must be a list of globs"),
        ("targets = [1]", "targets must be a list of globs"),
        ("pattern = 24", "pattern 24 is unknown"),
        ('trust_remote_code = "false"', "trust_remote_code"),
        ("override = 3", r"override must be a list of tables \(\[\[override\]\]\)"),
        ('[override]\nmatch = "a"', r"override must be a list of tables"),
        ("override = [1]", r"override must be a list of tables"),
        ("[[override]]\nskip = true", "an override needs match"),
        ('[[override]]\nmatch = "a"\nsamples = 1', "override of 'a' has unknown settings samples"),
        ('[[override]]\nmatch = "a"\nsparsity = 1', "sparsity must be a number"),
        ('[[override]]\nmatch = "a"\nskip = 1', "skip in the override of 'a' must be true or false"),
        ("sparsity = ", "is not valid TOML"),
        ("sparsity = 0.5\nsparsity = 0.6", "is not valid TOML"),
        ("outlier-rows = 0.1\noutlier_rows = 0.2", "outlier_rows"),
    ],
)
def test_bad_files_are_refused_and_named(tmp_path, text, match):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=match) as caught:
        Recipe.from_toml(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused_and_named(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.toml cannot be read: No such file"):
        Recipe.from_toml(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        Recipe.from_toml(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes('calibration = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.toml is not valid TOML"):
        Recipe.from_toml(path)
