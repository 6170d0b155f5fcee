"""A :class:`step.Contestant` of transformers in a process of its own, as torch leaves it. step.py starts it.

    python benchmarks/rival.py OPTIONS MODEL PRECISION STAGE

Answers each line on stdin, `warm_up` or `step`, with a number: bytes that a step takes, or its seconds.
"""

import sys

import torch

torch.zeros(2**24)  # by now torch and OpenMP have read the environment: importing mae_et changes nothing more

# isort: split
import json

from step import NUM_IMAGES, Contestant, StepConfig, pretrain_config, vit_mae
from synthetic import synthetic_run

from mae_et.engine.runtime import Runtime


def main() -> None:
    options, model, precision, index = sys.argv[1:]
    options = StepConfig(**json.loads(options))
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    rt = Runtime(torch.device("cpu" if device == "auto" else device), precision)  # not `start`, which sets things
    run = synthetic_run(pretrain_config(options, model), rt, NUM_IMAGES)
    stage = run.curriculum.stages[int(index)]
    contestant = Contestant(run, stage, vit_mae(run, stage))
    for line in sys.stdin:
        print(getattr(contestant, line.strip())(), flush=True)


if __name__ == "__main__":
    main()
