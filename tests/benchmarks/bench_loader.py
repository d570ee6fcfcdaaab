"""Time the loaders beside the plain torchvision pipeline, and say how far the colours are from torchvision's on PIL images.

The plain pipeline is the paper's appendix G from JPEG files: PIL and torchvision transforms in one DataLoader worker per core.
Ours are timed as the training loop uses them, the views cut but not coloured (that happens on the training device), and once
more with the colours rendered on the CPU. All are timed in turns, so that a noisy machine disturbs them alike. Images per
second are wall time; processor time per image (workers included) is what other processes disturb less. ffcv's compilation is
left out and given on its own.

    python tests/benchmarks/bench_loader.py --photos DIR [--seconds 60] [--views full|small] [--cores 2]
    python tests/benchmarks/bench_loader.py --photos DIR --equivalence
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from obowlab.config import Views
from obowlab.data.datasets import Split, open_split
from obowlab.data.prepare import prepare
from obowlab.views import photometric
from obowlab.views.draws import box_weights, recolourings
from obowlab.views.loaders import resolve_backend, train_loader
from obowlab.views.pil_views import decode
from obowlab.views.views import Colour

VIEWS = {
    "full": Views(num_crops=2, num_patches=5),
    "small": Views(original_size=32, original_resize=36, num_crops=2, crop_size=32),
}
CPU = torch.device("cpu")
ROUNDS = 3


# ----------------------------------------------------------------------------------------------------- the plain pipeline


class Blur:
    """Appendix G's blur: PIL's, with its own standard deviation every time."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class Patches:
    """Appendix G's overlapping patches of a 3x3 grid."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(self, image: Tensor) -> Tensor:
        size, jitter = self.views.patch_size, self.views.patch_jitter
        offset = (image.shape[1] - size - jitter) // 2
        corners = [
            (row * offset + random.randint(0, jitter), column * offset + random.randint(0, jitter))
            for row in range(3)
            for column in range(3)
        ]
        kept = torch.randperm(9)[: self.views.num_patches].tolist()
        return torch.stack(
            [image[:, corners[cell][0] : corners[cell][0] + size, corners[cell][1] : corners[cell][1] + size] for cell in kept]
        )


class PlainImages(Dataset[list[Tensor]]):
    """Images of a folder with all views of the paper, made by torchvision from PIL images."""

    def __init__(self, folder: Path, views: Views, order: list[int]) -> None:
        self.images, self.order, self.views = ImageFolder(folder), order, views
        end = [T.RandomHorizontalFlip(views.flip_probability), T.ToTensor(), T.Normalize(photometric.MEAN, photometric.STD)]
        strengths = (views.brightness, views.contrast, views.saturation, views.hue)
        colours = [
            T.RandomApply([T.ColorJitter(*strengths)], p=views.jitter_probability),
            T.RandomGrayscale(p=views.grayscale_probability),
        ]
        blur = T.RandomApply([Blur(views.blur_sigma)], p=views.blur_probability)
        self.original = T.Compose([T.Resize(views.original_resize), T.CenterCrop(views.original_size), *end])
        self.crop = T.Compose([T.RandomResizedCrop(views.crop_size, scale=views.crop_scale), *colours, blur, *end])
        self.patches = T.Compose(
            [T.RandomResizedCrop(views.patch_source_size, scale=views.patch_scale), *colours, *end, Patches(views)]
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> list[Tensor]:
        image, _ = self.images[self.order[position]]
        views = [self.original(image), torch.stack([self.crop(image) for _ in range(self.views.num_crops)])]
        return [*views, self.patches(image)] if self.views.num_patches else views


# ----------------------------------------------------------------------------------------------------------------- timing


def plain(folder: Path, views: Views, order: np.ndarray, *, batch_size: int, workers: int) -> Iterator[None]:
    """Yield once per batch of the plain pipeline."""
    for _ in DataLoader(PlainImages(folder, views, order.tolist()), batch_size=batch_size, num_workers=workers, drop_last=True):
        yield


def core_seconds() -> float:
    """Return the processor time of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(stream: Iterator[object], *, batch_size: int) -> tuple[float, float]:
    """Exhaust a stream; return images per second and processor milliseconds per image."""
    wall, core, images = time.perf_counter(), core_seconds(), 0
    for _ in stream:
        images += batch_size
    return images / (time.perf_counter() - wall), (core_seconds() - core) / images * 1e3


def compare(split: Split, folder: Path, *, views: Views, seconds: float, cores: int, batch_size: int) -> None:
    """Print the table of rates."""
    batch_size = min(batch_size, split.num_images)

    def rows(order: np.ndarray) -> dict[str, Callable[[], Iterator[object]]]:
        made: dict[str, Callable[[], Iterator[object]]] = {
            "plain torchvision": lambda: plain(folder, views, order, batch_size=batch_size, workers=cores)
        }
        for name in dict.fromkeys(("torch", resolve_backend("auto"))):
            loader = train_loader(split, subset=order, views=views, batch_size=batch_size, seed=0, backend=name, workers=cores)
            start = time.perf_counter()
            with contextlib.closing(loader.batches(epoch=0)) as warm:  # type: ignore[type-var]
                next(warm)
            print(f"{name}: first batch after {time.perf_counter() - start:.1f} s")
            made[f"obowlab {name}"] = lambda loader=loader: loader.batches(epoch=1)
            made[f"obowlab {name}, rendered on the CPU"] = lambda loader=loader: (
                photometric.render(batch, batch.numbers.on(CPU)[0], device=CPU) for batch in loader.batches(epoch=1)
            )
        return made

    probe = np.arange(split.num_images)
    rate, _ = timed(plain(folder, views, probe, batch_size=batch_size, workers=cores), batch_size=batch_size)
    # Of a round the plain pipeline takes about half.
    repeats = max(1, round(rate * seconds / ROUNDS / 2 / split.num_images))
    streams = rows(np.tile(probe, repeats))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    for _ in range(ROUNDS):
        for name, stream in streams.items():
            results[name].append(timed(stream(), batch_size=batch_size))
    base_rate, base_core = (statistics.median(values) for values in zip(*results["plain torchvision"], strict=True))
    images, load = split.num_images * repeats, os.getloadavg()[0]
    print(f"\n{images} images x {ROUNDS} rounds, batch {batch_size}, {cores} cores; load average {load:.1f}")
    print(f"{'':42}{'images/s':>10}{'lowest':>9}{'highest':>9}{'x plain':>9}{'core-ms/image':>15}{'x plain':>9}")
    for name, values in results.items():
        rates, core = [rate for rate, _ in values], statistics.median(core for _, core in values)
        rate = statistics.median(rates)
        print(
            f"{name:42}{rate:10.0f}{min(rates):9.0f}{max(rates):9.0f}{rate / base_rate:9.2f}{core:15.2f}{base_core / core:9.2f}"
        )


# ------------------------------------------------------------------------------------------------------------ equivalence


def equivalence(split: Split, *, count: int = 200, size: int = 160) -> None:
    """Print the difference of every operation from torchvision's on PIL images, in levels of 255."""
    rng = np.random.default_rng(0)
    chosen = range(0, split.num_images, max(1, split.num_images // count))
    with_pil = [F.center_crop(F.resize(decode(split, index), size), [size, size]) for index in chosen]
    images = np.stack([np.asarray(image) for image in with_pil])
    number = len(images)
    planes = torch.from_numpy(images).permute(3, 0, 1, 2).to(torch.float32).contiguous()
    strength, turn, sigma = rng.uniform(0.6, 1.4, number), rng.uniform(-0.1, 0.1, number), rng.uniform(0.1, 2.0, number)
    still = {"brightness": np.ones(number), "contrast": np.ones(number), "saturation": np.ones(number), "hue": np.zeros(number)}

    def jittered(**changes: np.ndarray) -> Tensor:
        result = planes.clone()
        order = np.tile(np.arange(4), (number, 1))
        none = np.zeros(number, dtype=bool)
        params = Colour(orders=order, grayscale=none, sigma=np.zeros(number), solarised=none, **(still | changes))
        photometric.jitter(result, *recolourings(params, none))
        return result

    rows: list[tuple[str, Tensor, Callable[[Image.Image, int], Image.Image]]] = [
        ("brightness .6 to 1.4", jittered(brightness=strength), lambda image, i: F.adjust_brightness(image, float(strength[i]))),
        ("contrast .6 to 1.4", jittered(contrast=strength), lambda image, i: F.adjust_contrast(image, float(strength[i]))),
        ("saturation .6 to 1.4", jittered(saturation=strength), lambda image, i: F.adjust_saturation(image, float(strength[i]))),
        ("hue -.1 to .1", jittered(hue=turn), lambda image, i: F.adjust_hue(image, float(turn[i]))),
        ("grayscale", photometric.luma(planes).expand_as(planes), lambda image, i: F.to_grayscale(image, 3)),
        (
            "blur .1 to 2",
            photometric.blur(planes, box_weights(sigma)),
            lambda image, i: image.filter(ImageFilter.GaussianBlur(float(sigma[i]))),
        ),
        ("flip", planes.flip(-1), lambda image, i: F.hflip(image)),
    ]
    print(f"{number} photographs at {size} pixels, difference from PIL in levels of 255")
    print(f"{'operation':24}{'mean':>9}{'largest':>9}{'pixels that differ':>20}")
    for name, ours, reference in rows:
        theirs = np.stack([np.asarray(reference(image, i)) for i, image in enumerate(with_pil)])
        difference = np.abs(ours.permute(1, 2, 3, 0).numpy() - theirs)
        print(f"{name:24}{difference.mean():9.4f}{difference.max():9.2f}{(difference > 0.5).any(axis=-1).mean() * 100:19.2f}%")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder CLASS/*.JPEG")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long the comparison may take")
    parser.add_argument("--views", choices=sorted(VIEWS), default="full")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--equivalence", action="store_true", help="compare colours instead of times")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the loaders have the cores; threads that wait in turns for a busy core would measure only that
    with tempfile.TemporaryDirectory() as root:
        prepare("bench", source=options.photos, data_root=Path(root))
        split = open_split("bench", "train", data_root=Path(root))
        if options.equivalence:
            equivalence(split)
            return
        compare(
            split,
            options.photos,
            views=VIEWS[options.views],
            seconds=options.seconds,
            cores=options.cores,
            batch_size=options.batch_size,
        )


if __name__ == "__main__":
    main()
