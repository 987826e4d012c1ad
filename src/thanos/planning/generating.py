"""Prediction of the time in which the dense model generates calibration text, from a few tokens that it generates."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from thanos.calibration.continued import Pieces, batch_size, generate_sequences
from thanos.calibration.generation import GENERATION_BATCH, SEEDS
from thanos.calibration.making import make_calibration
from thanos.calibration.prompts import read_prompt_ids
from thanos.errors import NumericsError
from thanos.events import Watcher
from thanos.model.loading import check_token_ids, load_model
from thanos.planning.kinds import Job
from thanos.recipe.repair import WITHOUT_GENERATED
from thanos.run.survey import name_damage
from thanos.system.memory import free_device_bytes, free_host_bytes

_POSITIONS = (4, 12)
"""Numbers of tokens that the model generates for each sequence, to measure the seconds per token."""


def generated_text(job: Job, watch: Watcher) -> tuple[Tensor, float]:
    """Let the model generate a few tokens of calibration text.

    Returns:
        The token ids, (n, T), random in place of those that the model would generate; and the predicted seconds of making the
        whole text. If the model does not fit in memory, it generates nothing, and its time is left out.
    """
    recipe, opened, device = job.recipe, job.prepared.opened, job.device
    vocabulary = opened.meta_model.get_input_embeddings().get_parameter("weight").shape[0]
    draw = torch.Generator().manual_seed(recipe.seed % SEEDS)
    count = recipe.generate or recipe.samples
    ids = torch.randint(vocabulary, (count, recipe.sequence_length), generator=draw)
    free = free_device_bytes(device) if device.type == "cuda" else free_host_bytes()
    fits = job.block_bytes(None) <= free
    if not recipe.generate:
        return ids, _own_text(job, watch) if fits else 0.0
    began = time.perf_counter()
    text = make_calibration(opened.source, replace(recipe, **WITHOUT_GENERATED), device, watch)
    check_token_ids(text.ids, opened.meta_model)
    seconds = time.perf_counter() - began
    if fits:
        try:
            seconds += _continued_pieces(job, text.ids, text.bos_ids)
        except NumericsError:
            name_damage(opened, None)
            raise
    return torch.cat([ids, text.ids]), seconds


def _own_text(job: Job, watch: Watcher) -> float:
    """Return the predicted seconds of calibration ``self``."""
    recipe = job.recipe
    spent, samples = list[float](), min(GENERATION_BATCH, recipe.samples)
    for length in _POSITIONS:
        began = time.perf_counter()
        few = replace(recipe, samples=samples, sequence_length=min(length, recipe.sequence_length))
        make_calibration(job.prepared.opened.source, few, job.device, watch)
        spent.append(time.perf_counter() - began)
    each = max(0.0, spent[1] - spent[0]) / (_POSITIONS[1] - _POSITIONS[0])
    positions = math.ceil(recipe.samples / samples) * recipe.sequence_length
    return spent[0] + each * max(0, positions - _POSITIONS[0])


def _continued_pieces(job: Job, ids: Tensor, bos: tuple[int, ...]) -> float:
    """Return the predicted seconds in which the model is loaded and continues pieces of the text ``ids``, (n, T)."""
    recipe, began = job.recipe, time.perf_counter()
    model = load_model(job.prepared.opened.source, dtype=recipe.dtype, device=job.device)
    loading = time.perf_counter() - began
    width = ids.shape[1] - len(bos)
    segment = min(recipe.segment, width)
    source = job.prepared.opened.source
    prompts = read_prompt_ids(recipe, source.tokenizer(), width, lambda event: None, model)
    prompt = min(map(len, prompts), default=min(recipe.prompt, segment // 2))
    pieces = math.ceil(recipe.generate * width / segment)
    batch, spent, new = min(batch_size(job.device, segment), pieces), list[float](), list[int]()
    for positions in _POSITIONS:
        # At least twice the prompt: in a shorter piece the prompt is shorter too.
        length = min(2 * prompt + positions, segment)
        new.append(length - min(prompt, length // 2))
        began = time.perf_counter()
        text = ids[:, : len(bos) + length]
        generate_sequences(model, text, bos, batch, 0, 0, lambda event: None, Pieces(length, prompt))
        spent.append(time.perf_counter() - began)
    apart = new[1] - new[0]
    each = max(0.0, spent[1] - spent[0]) / apart if apart else spent[1] / max(1, new[1])
    return loading + math.ceil(pieces / batch) * (spent[0] + each * (segment - prompt - new[0]))
