"""Peak memory and time of making the BoW targets of one batch, in chunks and all at once.

conv4 (256 channels, 14x14, cropped to 12x12) and conv5 (512 channels, 7x7, cropped to 5x5). Every measurement is taken in a
process of its own: the growth of its peak resident memory over what it held with the inputs and warm kernels.

    python tests/benchmarks/bench_targets.py --batch-size 64 --threads 1
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

LEVELS = {"conv4": (256, 14), "conv5": (512, 7)}


def measure(variant: str, *, batch_size: int, num_words: int, threads: int) -> dict[str, float]:
    """Make the targets of both levels once; return MiB of peak growth and seconds."""
    import torch

    from obowlab.methods import bow

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    words = {level: torch.randn(num_words, channels).clamp_(min=0) for level, (channels, _) in LEVELS.items()}
    maps = {level: torch.randn(batch_size, channels, size, size).clamp_(min=0) for level, (channels, size) in LEVELS.items()}

    def chunked(local: torch.Tensor, level_words: torch.Tensor) -> torch.Tensor:
        distances = bow.Distances(local, level_words, keep=bow.KEEP_ELEMENTS)
        msd = bow.next_msd(torch.tensor(0.5), bow.nearest_words(distances)[0].mean(), momentum=0.99)
        return bow.soft_bow(distances, delta=0.1 * msd, pooling="max")

    def at_once(local: torch.Tensor, level_words: torch.Tensor) -> torch.Tensor:
        dist = local.square().sum(2, keepdim=True) + level_words.square().sum(1) - 2 * local @ level_words.T
        msd = 0.99 * 0.5 + 0.01 * dist.amin(2).mean()
        target = torch.softmax(-dist / (0.1 * msd), dim=2).amax(1)
        return target / target.sum(1, keepdim=True)

    def at_once_in_place(local: torch.Tensor, level_words: torch.Tensor) -> torch.Tensor:
        dist = bow.squared_distances(local.flatten(0, 1), level_words).view(*local.shape[:2], -1)
        msd = bow.next_msd(torch.tensor(0.5), dist.amin(2).mean(), momentum=0.99)
        torch.softmax(dist.mul_(-1 / (0.1 * msd)), dim=2, out=dist)
        return bow.bow_target(dist.amax(1))

    make = {"chunked": chunked, "at_once": at_once, "at_once_in_place": at_once_in_place}[variant]

    def targets(num_images: int) -> None:
        for level, each in maps.items():
            local = bow.crop_border(each[:num_images], border=1).flatten(2).transpose(1, 2).contiguous()
            make(local, words[level])

    targets(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    targets(batch_size)
    elapsed_s = time.perf_counter() - start
    return {"mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": elapsed_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-words", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, batch_size=args.batch_size, num_words=args.num_words, threads=args.threads)))
        return
    found = {}
    # This process never imports torch: a child's peak starts at what its parent held.
    for variant in ("chunked", "at_once_in_place", "at_once"):
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        found[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{variant:16s} {found[variant]['mib']:8.1f} MiB  {found[variant]['seconds']:6.3f} s")
    for variant in ("at_once_in_place", "at_once"):
        memory, duration = (found["chunked"][key] / found[variant][key] for key in ("mib", "seconds"))
        print(f"chunked / {variant}: memory {memory:.3f}, time {duration:.3f}")


if __name__ == "__main__":
    main()
