"""The training of train.py on a Ray cluster: python ray_train.py --processes 8 --gpu --data
/shared/flowers --output /shared/runs."""
import argparse
import os
from typing import Any

import ray.train
from ray.train.lightning import (RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback,
                                 prepare_trainer)
from ray.train.torch import TorchTrainer
from train import build, parse


def work(config: dict[str, Any]) -> None:
    "What each process does: Ray has started it and says who the others are."
    model, data, trainer = build(
        parse(config["arguments"]), devices="auto", strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[RayTrainReportCallback()], enable_progress_bar=False)
    prepare_trainer(trainer).fit(model, datamodule=data, ckpt_path="auto")


def main() -> None:
    "Start the processes, and start them again where one of them is lost."
    parser = argparse.ArgumentParser(description=__doc__,
                                     epilog="Every other argument is one of train.py.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each process")
    mine, arguments = parser.parse_known_args()
    output = os.path.abspath(parse(arguments).output)
    found = TorchTrainer(
        work, train_loop_config={"arguments": [*arguments, "--output", output]},
        scaling_config=ray.train.ScalingConfig(num_workers=mine.processes, use_gpu=mine.gpu),
        run_config=ray.train.RunConfig(name="ray", storage_path=output,
                                       failure_config=ray.train.FailureConfig(max_failures=3)),
    ).fit()
    print(found.metrics)


if __name__ == "__main__":
    main()
