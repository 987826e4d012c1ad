r"""Compare the predictions of ``thanos prune --plan`` with runs: seconds and peak memory of several models.

    OMP_NUM_THREADS=1 python benchmarks/plan.py /data/models
    OMP_NUM_THREADS=2 python benchmarks/plan.py /data/models --busy
    OMP_NUM_THREADS=1 python benchmarks/plan.py /data/models --processor-time

The script writes models of random weights into the folder, which later calls reuse: a Llama, a GPT-2, a mixture of experts, and
a Llama whose blocks take milliseconds. ``--model`` adds another model. The plan and the run are separate processes, one after
the other. ``--busy`` runs another program on one core. With ``--processor-time`` both are measured in processor seconds instead
of elapsed seconds; with one thread these are about the seconds on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import write_text, write_tokenizer

VOCABULARY = 4096

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
        "num_key_value_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 2048,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 640, "n_head": 10, "n_layer": 6, "n_positions": 1024},
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 2048,
    },
}  # fmt: skip

_START = "import sys, time\n{clock}from thanos.cli import run\nsys.exit(run(sys.argv[1:]))"


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """Write a bfloat16 model as transformers initialises it, with one token per number; return the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not folder.exists():
        torch.manual_seed(0)
        settings = AutoConfig.for_model(**config, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).to(torch.bfloat16)
        model.save_pretrained(folder)
        write_tokenizer(folder, VOCABULARY)
    return folder


@contextmanager
def another_program(*, wanted: bool) -> Iterator[None]:
    """Keep the first core that this process may use busy with another process."""
    if not wanted:
        yield
        return
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def compare(model: Path, out: Path, options: list[str], clock: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plan and the report of a run, as their JSON."""
    command = [
        sys.executable,
        "-c",
        _START.format(clock=clock),
        "prune",
        str(model),
        str(out),
        "--quiet",
        "--overwrite",
    ]
    planned = subprocess.run([*command, *options, "--plan", "--json", "-"], check=True, capture_output=True, text=True)
    subprocess.run([*command, *options], check=True, capture_output=True)
    report = json.loads((out / "pruning.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return json.loads(planned.stdout), report


def row(name: str, plan: dict[str, Any], report: dict[str, Any], loads: tuple[float, float]) -> str:
    """Return a row of the table: seconds and megabytes, predicted and measured, and the load of the machine."""
    seconds = plan["seconds"], sum(phase["seconds"] for phase in report["phases"].values())
    memory = [("host", plan["host_peak_bytes"], report["host_peak_bytes"])]
    if plan["device_peak_bytes"]:
        memory.append(("device", plan["device_peak_bytes"], report["device_peak_bytes"]))
    cells = [name, f"{seconds[0]:.1f}", f"{seconds[1]:.1f}", f"{100 * (seconds[0] / seconds[1] - 1):+.0f} %"]
    cells += [f"{kind} {a / 1e6:.0f} | {b / 1e6:.0f} | {100 * (a / b - 1):+.0f} %" for kind, a, b in memory]
    return f"| {' | '.join(cells)} | {loads[0]:.1f}, {loads[1]:.1f} |"


def main() -> None:
    """Print a table of all models, and the seconds of each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="another model, with calibration text pydoc")
    parser.add_argument("--only", choices=[*CONFIGS, "model"], nargs="*")
    parser.add_argument("--samples", default="16")
    parser.add_argument("--sequence-length", default="512")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    given, further = parser.parse_known_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    tokens = int(given.samples) * int(given.sequence_length)
    text = str(write_text(given.folder / "numbers.txt", VOCABULARY, 2 * tokens))
    jobs = {name: (write_model(given.folder / name, config), text) for name, config in CONFIGS.items()}
    if given.model:
        jobs["model"] = given.model, "pydoc"
    clock = "time.perf_counter = time.process_time\n" if given.processor_time else ""
    print("| model | predicted s | measured s | | predicted MB | measured MB | | load before, after |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (model, calibration) in jobs.items():
        if given.only and name not in given.only:
            continue
        options = ["--calibration", calibration, "--samples", given.samples, "--device", given.device]
        options += ["--sequence-length", given.sequence_length, *further]
        before = os.getloadavg()[0]
        with another_program(wanted=given.busy):
            plan, report = compare(model, given.folder / "out", options, clock)
        print(row(name, plan, report, (before, os.getloadavg()[0])), flush=True)
        for phase, record in report["phases"].items():
            planned = plan["phases"].get(phase, {"seconds": 0.0, "host_peak_bytes": 0})
            print(
                f"  {phase}: {planned['seconds']:.2f} s, {record['seconds']:.2f} s; "
                f"{planned['host_peak_bytes'] / 1e6:.0f} MB, {record['host_peak_bytes'] / 1e6:.0f} MB",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
