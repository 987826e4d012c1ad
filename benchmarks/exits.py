"""Count the exit codes of the processes of many short runs. Each must be 0.

    python benchmarks/exits.py --runs 100 --processes 2 4

During half of the runs another program occupies a core. The processes are forked from this one, which has imported the command,
so a run takes only a second or two. As with torchrun, they connect to a store in another process, and each ends Python in the
usual way. The script prints the output of failed processes, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# The slow imports of a run, except torch.distributed.nn.functional and the modules that need it. Those are imported when a real
# run imports them, since the time of the import decides how a process ends (engine/leaving.py).
import scipy.special  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch.distributed.tensor
import torch.fx.experimental.symbolic_shapes
import transformers.tokenization_utils_tokenizers  # noqa: F401

import thanos.cli.app
import thanos.run.prune

STORES = """
import sys, torch.distributed as d
stores = []
for _ in sys.stdin:
    stores.append(d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    print(stores[-1].port, flush=True)
"""
"""A program that makes a store for each line that it reads. Its own process, since its threads would not survive a fork."""

MODEL = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(63)} | {"?": 63}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(sys.argv[1])
"""
"""A program that writes a tiny model. It runs in its own process, so that no thread is left here when the runs are forked."""


def main() -> int:
    """Start the runs, the numbers of processes in turn, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    # No context managers from here on: a forked process leaves through this frame, and must not clean up.
    folder = Path(tempfile.mkdtemp())
    subprocess.run([sys.executable, "-c", MODEL, folder / "model"], check=True, stderr=subprocess.DEVNULL)
    (folder / "text.txt").write_text(" ".join(f"w{n * n % 63}" for n in range(2000)))
    stores = subprocess.Popen([sys.executable, "-c", STORES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stores.stdin is not None
    assert stores.stdout is not None
    torch.set_num_threads(1)
    assert "torch.distributed.nn.functional" not in sys.modules
    failed = 0
    for number in range(options.runs * len(options.processes)):
        size = options.processes[number % len(options.processes)]
        busy = number // len(options.processes) % 2 == 1
        print(file=stores.stdin, flush=True)
        port = stores.stdout.readline().strip()
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        codes = run(port, size, folder)
        if other is not None:
            other.kill()
            other.wait()
        failed += any(codes)
        for rank, code in enumerate(codes):
            if code:
                print(f"run {number}{', one core busy' * busy}, rank {rank} of {size}: exit code {code}")
                print((folder / f"{rank}.err").read_text(), flush=True)
        if number % 10 == 9:
            print(f"{number + 1} runs, {failed} failed", flush=True)
    stores.kill()
    stores.wait()
    shutil.rmtree(folder)
    print(f"{options.runs} runs of each of {options.processes} processes: {failed} failed")
    return int(failed > 0)


def run(port: str, size: int, folder: Path) -> list[int]:
    """Prune on ``size`` processes; return their exit codes. As torchrun does, end the others if one fails."""
    pids: dict[int, int] = {}
    for rank in range(size):
        pid = os.fork()
        if not pid:
            work(port, size, rank, folder)
        pids[pid] = rank
    codes = [0] * size
    while pids:
        pid, status = os.wait()
        if pid in pids:  # and not the stores' process
            rank = pids.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            for other in pids if codes[rank] else ():
                os.kill(other, signal.SIGTERM)
    return codes


def work(port: str, size: int, rank: int, folder: Path) -> None:
    """Run the command as torchrun would start it, and exit."""
    variables: dict[str, object] = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    variables |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # the store exists already
    os.environ |= {name: str(value) for name, value in variables.items()}
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    arguments = ["prune", str(folder / "model"), str(folder / "out"), "--calibration", str(folder / "text.txt")]
    arguments += ["--samples", "4", "--sequence-length", "16", "--device", "cpu", "--quiet", "--overwrite"]
    thanos.cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
