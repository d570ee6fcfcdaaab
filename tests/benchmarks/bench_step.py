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
import time
from collections.abc import Callable

import torch

from obowlab.config import load_recipe
from obowlab.methods import METHODS, Batch, OneProcess
from obowlab.training.optimizers import build_optimizer
from tests.gpu.precision import PRECISIONS, precision


class Work:
    """A step of an OBoW recipe on a fixed batch of random views, and the encoder work in it."""

    def __init__(
        self,
        recipe: str,
        *,
        batch_size: int,
        device: torch.device,
        precision: str = "float32",
        contiguous: bool = False,
        overrides: tuple[str, ...] = (),
    ) -> None:
        """Build method, optimiser and batch.

        Args:
            recipe: its name.
            batch_size: images of this process.
            device: where.
            precision: one of PRECISIONS but float16, whose loss would have to be scaled.
            contiguous: plain NCHW images and weights instead of channels_last.
            overrides: changes of the recipe.
        """
        self.recipe = load_recipe(recipe, overrides=overrides).recipe
        self.batch_size, self.device, self.precision = batch_size, device, precision
        self._layout = torch.contiguous_format if contiguous else torch.channels_last
        self.model = METHODS[self.recipe.method.name](
            self.recipe.method, backbone=self.recipe.backbone, total_steps=1000, seed=0, num_classes=None, comm=OneProcess()
        )
        self.model.to(device).to(memory_format=self._layout)
        self.optimizer = build_optimizer(self.recipe.optimizer, method=self.model)
        views = self.recipe.views
        self._generator = torch.Generator(device).manual_seed(0)
        self.original = self._images(batch_size, views.original_size)
        kinds = {"crops": (views.num_crops, views.cut_size), "patches": (views.num_patches, views.patch_size)}
        self.views = {kind: self._images(batch_size * count, size) for kind, (count, size) in kinds.items() if count}
        shape = (batch_size, self.model.num_uniforms)
        self._uniforms = torch.rand(shape, dtype=torch.float64, device=device, generator=self._generator)
        self._done = 0

    def _images(self, count: int, size: int) -> torch.Tensor:
        shape = (count, 3, size, size)
        return torch.randn(shape, device=self.device, generator=self._generator).contiguous(memory_format=self._layout)

    def step(self) -> None:
        """Do one update of the optimiser."""
        with precision(self.precision, device=self.device):
            batch = Batch(original=self.original, views=self.views, uniforms=self._uniforms, step=self._done, wants_metrics=False)
            output = self.model(batch)
        self._backward(output.loss)
        with precision(self.precision, device=self.device):
            self.optimizer.step()
        self._done += 1

    def encoders(self) -> None:
        """Do the encoder work of a step."""
        with precision(self.precision, device=self.device):
            loss = torch.stack([self.model.student(each).float().square().mean() for each in self.views.values()]).sum()
            with torch.no_grad():
                self.model.teacher(self.original)
        self._backward(loss)

    def _backward(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with precision("tf32" if self.precision == "tf32" else "float32", device=self.device):  # autocast is forward's alone
            loss.backward()

    def seconds(self, work: Callable[[], None]) -> tuple[float, float]:
        """Return wall time and processor time of `step` or `encoders`."""
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start, time.process_time() - start_cpu

    def rounds(self, number: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Return the times of the encoder work and of the step, in turns; the first of each is not counted."""
        self.encoders(), self.step()  # they pay for kernels and memory
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [(self.seconds(self.encoders), self.seconds(self.step)) for _ in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="imagenet20-full")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-words", type=int, default=8192)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=[name for name in PRECISIONS if name != "float16"], default="float32")
    parser.add_argument("--contiguous", action="store_true", help="plain NCHW images and weights instead of channels_last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = Work(
        args.recipe,
        batch_size=args.batch_size,
        device=torch.device(args.device),
        precision=args.precision,
        contiguous=args.contiguous,
        overrides=(f"method.num_words={args.num_words}",),
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
