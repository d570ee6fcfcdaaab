"""Time one OBoW training step beside the encoder work inside it.

The encoder work is the student's forward and backward pass on the same crops and the teacher's forward pass; the step adds
vocabulary, BoW targets, G, losses, metrics, the teacher's update and SGD. The two are timed in turns, so that a noisy
machine disturbs both alike; the ratio is the median over the rounds. On a CPU the processor time of this process is given
beside the wall time: other processes disturb it less.

    python tests/benchmarks/bench_step.py --batch-size 16 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from obowlab.config import Backbone, Obow
from obowlab.methods import Batch, OBoW, OneProcess


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Return wall time and processor time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-words", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--contiguous", action="store_true", help="plain NCHW images and weights instead of channels_last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last

    method = Obow(levels=("conv4", "conv5"), num_words=args.num_words)
    model = OBoW(method, backbone=Backbone(), total_steps=1000, seed=0, num_classes=None, comm=OneProcess())
    model.to(device=device, memory_format=layout)
    optimizer = torch.optim.SGD(model.param_groups(weight_decay=5e-4), lr=0.05, momentum=0.9)

    def images(count: int, size: int) -> torch.Tensor:
        return torch.randn(count, 3, size, size).to(device=device, memory_format=layout)

    original = images(args.batch_size, 224)
    views = {"crops": images(args.batch_size * 2, 160), "patches": images(args.batch_size * 5, 96)}
    uniforms = torch.rand(args.batch_size, model.num_uniforms, dtype=torch.float64, device=device)
    steps = iter(range(10**6))

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bfloat16")

    def step() -> None:
        with autocast():
            batch = Batch(original=original, views=views, uniforms=uniforms, step=next(steps), wants_metrics=False)
            output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

    def encoders() -> None:
        with autocast():
            loss = torch.stack([model.student(each).float().square().mean() for each in views.values()]).sum()
            with torch.no_grad():
                model.teacher(original)
        optimizer.zero_grad()
        loss.backward()

    encoders(), step()  # the first of each pays for kernels and memory
    rounds = [(seconds(encoders), seconds(step)) for _ in range(args.rounds)]
    print(
        f"batch {args.batch_size}, {args.threads} thread(s), {args.device}, {args.precision}, "
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
