"""What a training step costs: processor time and memory, measured by Lightning's own loop.

    python experiments/cost.py NAME RUN

takes `STEPS` steps as the run did, and keeps the least seconds of a step and the highest resident
memory of the process in `experiments/results/NAME/cost.json`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from make_results import RESULTS, keep, origin

from lightning_genseg.cli.main import main as genseg

STEPS = 12


class StepCost(Callback):
    """From one batch to the next: loss, gradient, optimiser, and what follows, such as EM.

    The workers that load images are processes of their own and do not count.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the processor time of all threads."""
        self.times.append(time.process_time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the least difference, without the first steps, and the memory (Linux)."""
        steps = [b - a for a, b in zip(self.times[2:], self.times[3:], strict=False)]
        memory = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        cost = {"step_seconds": min(steps), "memory_MB": int(memory) / 2**10}
        self.path.write_text(json.dumps(cost))


def main() -> None:
    """Measure, and keep it with the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cost.json"
        genseg(
            [
                "fit",
                f"--config={args.run / 'config.yaml'}",
                f"--trainer.max_steps={STEPS}",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                "--trainer.callbacks+=cost.StepCost",
                f"--trainer.callbacks.path={path}",
                f"--trainer.logger.init_args.save_dir={folder}",
            ]
        )
        cost = json.loads(path.read_text())
    keep(RESULTS / args.name / "cost.json", {**origin(), **cost})
    print(f"{args.name}: {cost}")


if __name__ == "__main__":
    main()
