"""OUT appears whole or not at all, and whatever a crash leaves beside it is recognised for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thanos.checkpoint.weight_files import SINGLE_NAME
from thanos.engine.records import BlockRecord
from thanos.errors import ResourceError, UserError
from thanos.run.work_folder import WorkFolder, check_output

RUN = {"schema": 1, "blocks": 2}
RECORD = BlockRecord(block=0, layers=[], tensors={}, batch=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "model"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, folder / SINGLE_NAME)
    return folder


def test_out_that_may_be_written(tmp_path: Path, model: Path) -> None:
    for out in (tmp_path / "new", tmp_path / "deep" / "er", model.parent / "model2", model.parent / "mode"):
        check_output(out, model=model, overwrite=False)
        check_output(out, model=None, overwrite=False)
        assert not out.exists(), "the check changes nothing"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", model=model, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [".", "inside", "inside/deeper"])
def test_out_in_the_model(model: Path, where: str, overwrite: bool) -> None:
    with pytest.raises(UserError, match="the model's own folder, or inside it; choose"):
        check_output(model / where, model=model, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_by_another_name(tmp_path: Path, model: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(UserError, match="own folder"):
        check_output(tmp_path / "link", model=model, overwrite=overwrite)
    with pytest.raises(UserError, match="own folder"):
        check_output(model, model=tmp_path / "link", overwrite=overwrite)
    with pytest.raises(UserError, match="own folder"):
        check_output(model / "x" / "..", model=model, overwrite=overwrite)
    monkeypatch.chdir(model.parent)
    with pytest.raises(UserError, match="own folder"):
        check_output(Path("model"), model=model, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_that_holds_the_model(model: Path, overwrite: bool) -> None:
    with pytest.raises(UserError, match=r"holds the model .* lost"):
        check_output(model.parent, model=model, overwrite=overwrite)


def test_out_that_holds_a_gguf(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lost"):
        check_output(folder, model=folder / "a.gguf", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_a_file(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", model=None, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "x"


def test_out_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        check_output(tmp_path, model=None, overwrite=False)
    check_output(tmp_path, model=None, overwrite=True)


def test_overwrite_deletes_only_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a model checkpoint"):
        check_output(tmp_path, model=None, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_work_folder_is_a_new_hidden_sibling(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    work = WorkFolder(out)
    work.start(RUN)
    assert work.path.parent == out.parent
    assert work.path.name.startswith(".")
    assert list(work.model.iterdir()) == []
    assert work.run == RUN
    assert not out.exists()
    (work.model / "left").write_text("by a killed run")
    work.start(RUN)
    assert list(work.model.iterdir()) == []


def test_work_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write next to OUT"):
        WorkFolder(tmp_path / "file" / "out").start(RUN)


def filled(out: Path, text: str = "new") -> WorkFolder:
    work = WorkFolder(out)
    work.start(RUN)
    (work.model / "config.json").write_text(text)
    return work


def test_publish_renames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    filled(out).publish(overwrite=False)
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside it"


def test_publish_into_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    filled(out).publish(overwrite=False)
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_publish_replaces_all_of_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    filled(out).publish(overwrite=True)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_publish_refuses_what_came_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = filled(out)
    out.mkdir()
    (out / "config.json").write_text("someone else's")
    with pytest.raises(UserError, match=r"out was created.*--resume") as refused:
        work.publish(overwrite=False)
    assert "give both options: --resume takes the result, --overwrite lets it replace OUT" in str(refused.value)
    assert (out / "config.json").read_text() == "someone else's"
    assert (work.model / "config.json").read_text() == "new", "the work is not lost"


@pytest.mark.parametrize("exists", [True, False])
def test_out_is_a_symbolic_link(tmp_path: Path, exists: bool) -> None:
    """The folder goes to where the link points, and the link stays."""
    target = tmp_path / "disk" / "target"
    if exists:
        target.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    check_output(link, model=None, overwrite=False)
    work = filled(link)
    assert work.path.parent == target.parent, "on the disk where the folder will be"
    work.publish(overwrite=False)
    assert link.is_symlink()
    assert (link / "config.json").read_text() == "new"
    assert (target / "config.json").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_link_to_the_old_checkpoint_is_replaced_where_it_points(tmp_path: Path) -> None:
    target = tmp_path / "disk" / "target"
    target.mkdir(parents=True)
    (target / "config.json").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(UserError, match="not empty"):
        check_output(link, model=None, overwrite=False)
    check_output(link, model=None, overwrite=True)
    filled(link).publish(overwrite=True)
    assert link.is_symlink()
    assert (target / "config.json").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ("config.json", "model.safetensors"),
        ("config.json", "pytorch_model.bin"),
        ("adapter_config.json", "adapter_model.safetensors"),
    ],
)
def test_out_inside_the_folder_of_another_model(config: str, weights: str, tmp_path: Path) -> None:
    """The other's weights would be beside OUT, or OUT in a copy of its folder."""
    other = tmp_path / "other"
    other.mkdir()
    (other / config).write_text("{}")
    for out in (other / "out", other / "deep" / "er" / "out"):
        check_output(out, model=None, overwrite=False)  # a config alone is no model
    (other / weights).write_text("weights")
    link = tmp_path / "link"
    link.symlink_to(other)
    for out in (other / "out", other / "deep" / "er" / "out", link / "out"):
        for model in (None, tmp_path / "model"):
            with pytest.raises(
                UserError, match=rf"inside the folder of another model, {other}; choose a folder outside"
            ):
                check_output(out, model=model, overwrite=True)
    check_output(other, model=None, overwrite=True)  # itself is replaced whole
    check_output(tmp_path / "out", model=other, overwrite=False)
