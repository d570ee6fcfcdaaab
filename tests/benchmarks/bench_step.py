"""Time one OBoW training step beside the encoder work inside it.

The encoder work is the student's forward and backward pass on the same crops and the teacher's forward pass; the step adds
vocabulary, BoW targets, G, losses, metrics, the teacher's update and SGD. The two are timed in turns, so that a noisy
machine disturbs both alike; the ratio is the median over the rounds. On a CPU the processor time of this process is given
beside the wall time: other processes disturb it less.

    PYTHONPATH=. python tests/benchmarks/bench_step.py --batch-size 16 --threads 1
    PYTHONPATH=. python tests/benchmarks/bench_step.py --recipe full --batch-size 64 --device cuda --precision bfloat16
"""

from __future__ import annotations

import argparse
import statistics

import torch

from obowlab.config import load_recipe
from obowlab.training.work import Work
from tests.gpu.precision import PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="imagenet20-full")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-words", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--contiguous", action="store_true", help="plain NCHW images and weights instead of channels_last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = (f"method.num_words={args.num_words}", f"training.precision={args.precision}")
    work = Work(
        load_recipe(args.recipe, overrides=overrides).recipe,
        batch_size=args.batch_size,
        device=torch.device(args.device),
        channels_last=not args.contiguous,
    )
    rounds = work.rounds(args.rounds)
    print(
        f"{args.recipe}, batch {args.batch_size}, {args.threads} thread(s), {args.device}, {args.precision}, "
        f"{'NCHW' if args.contiguous else 'channels_last'}, {args.rounds} rounds:"
    )
    for clock, name in enumerate(["wall", "processor"]):
        encoder_s, step_s = (statistics.median(each[clock] for each in column) for column in zip(*rounds, strict=True))
        ratios = sorted(step[clock] / encoder[clock] for encoder, step in rounds)
        print(
            f"  {name:9s} time: encoders {encoder_s:.3f} s, step {step_s:.3f} s, "
            f"ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
