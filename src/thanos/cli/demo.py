"""``make demo``: prune a real model on this machine and show the results in one table.

This is not a command of ``thanos``. It runs one prune and one evaluation with small settings, on the help of Python's standard
library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from thanos.cli import output, tables
from thanos.cli import progress as display

_RECIPE = {"sparsity": 0.5, "calibration": "pydoc", "samples": 32, "sequence_length": 512}
_EVALUATION = {"text": "pydoc", "sequence_length": 512, "max_windows": 32}


def demo(model: str, out: Path) -> None:
    """Prune ``model`` to 50 % with Thanos, write it to ``out``, evaluate the dense and the pruned model, print the table."""
    display.hush()
    import torch

    import thanos
    from thanos.system.meter import PhaseMeter

    with display.watch() as watcher:
        report = thanos.prune(model, out, thanos.Recipe(**_RECIPE), overwrite=True, on_event=watcher)
        meter = PhaseMeter(torch.device("cpu"))
        with meter.phase("evaluate both"):
            result = thanos.evaluate(out, dense=model, on_event=watcher, **_EVALUATION)
    totals = report.totals
    assert result.kl_divergence is not None
    assert result.top1_agreement is not None
    rows = [
        ("perplexity, dense", f"{result.dense_perplexity:.3f}"),
        ("perplexity, pruned", f"{result.perplexity:.3f}"),
        ("KL divergence, nats a token", f"{result.kl_divergence:.4f}"),
        ("same most probable token", f"{100 * result.top1_agreement:.1f} %"),
        ("zeros in the pruned layers", f"{totals['zeros_targeted']:,} of {totals['targeted_parameters']:,}"),
        ("sparsity of the pruned layers", f"{100 * totals['sparsity_targeted']:.4f} %"),
        ("sparsity of all parameters", f"{100 * totals['sparsity_all']:.4f} %"),
        ("mean layer error, zeros alone", f"{totals['mean_error_before_compensation']:.5f}"),
        ("mean layer error, compensated", f"{totals['mean_error_after_compensation']:.5f}"),
        *tables.phase_rows(report.phases),
        *tables.phase_rows(meter.records()),
        ("written to", str(out)),
    ]
    tables.print_table(("", ""), rows, title=f"{Path(model).name}, pruned with Thanos on the CPU")
    output.show_warnings(report)


if __name__ == "__main__":
    from thanos.cli import guard

    sys.exit(guard(lambda: demo(sys.argv[1], Path(sys.argv[2]))))
