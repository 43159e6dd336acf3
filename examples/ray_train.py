"""A run under Ray Train: ``python examples/ray_train.py run.yaml --workers 2 --storage /shared/ray``.

Ray starts the workers, sets the variables by which they find each other, and starts all of them again after a failure.
The rest is ``lorakeet train``: the same settings, the same folder, and a run that was interrupted goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
from typing import Any

from lorakeet.config import read_run
from lorakeet.runs.run_folder import read_summary


def train(loop: dict[str, Any]) -> None:
    """Train in one worker of Ray."""
    from lorakeet.train.run import run_training

    run_training(read_run(loop["file"], loop["overrides"]))


def main() -> None:
    """Start the workers, and print the figures of the run when they have ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--storage", help="folder that all machines share, for Ray's own files")
    parser.add_argument("--max-failures", type=int, default=3)
    given = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train,
        train_loop_config={"file": given.file, "overrides": given.overrides},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(storage_path=given.storage, failure_config=FailureConfig(max_failures=given.max_failures)),
    )
    trainer.fit()
    summary = read_summary(read_run(given.file, given.overrides).out)
    print(f"{summary['processes']} processes, held-out loss {summary['eval_loss_after']}")


if __name__ == "__main__":
    main()
