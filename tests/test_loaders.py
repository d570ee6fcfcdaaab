"""Both backends give the same bytes whatever the workers, processes and starting step, and fail with one sentence."""

import io
import multiprocessing
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from obowlab.config import CropView, Views
from obowlab.data.datasets import open_split
from obowlab.data.prepare import prepare
from obowlab.errors import UserError
from obowlab.randomness import epoch_order
from obowlab.views import loaders
from obowlab.views.draws import draw
from obowlab.views.loaders import centre_loader, resolve_backend, train_loader
from obowlab.views.pil_views import Cutter, decode

VIEWS = Views(
    original_size=40,
    original_resize=44,
    num_crops=2,
    crop_size=32,
    num_patches=3,
    patch_size=16,
    patch_source_size=48,
    patch_jitter=4,
)
FOUR_KINDS = VIEWS.model_copy(update={"num_small_crops": 3, "small_crop_size": 20})
CROPS_ONLY = Views(original_size=24, original_resize=24, num_crops=1, crop_size=16)
SIZES = [(60, 80), (80, 60), (50, 50), (33, 97), (120, 41), (24, 24), (40, 90), (64, 48), (20, 30), (100, 75), (61, 59)]
STRAY = 5
"""This image's JPEG has stray bytes before its end: libturbojpeg warns of them, PIL reads it."""
GRAY = 6
"""This image's JPEG has one channel."""


def jpeg(height, width, *, seed):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image = Image.fromarray(
        (np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )
    image = image.convert("L") if seed == GRAY else image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(60, 98)), subsampling=seed % 3, progressive=seed % 4 == 0)
    data = buffer.getvalue()
    return data[:-2] + b"\x12" * 20 + data[-2:] if seed == STRAY else data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for number, (height, width) in enumerate(SIZES * 2):
        folder = source / "train" / f"class{number // 11}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.JPEG").write_bytes(jpeg(height, width, seed=number))
    data_root = tmp_path_factory.mktemp("data")
    prepare("little", source=source, data_root=data_root, val_fraction=0.0)
    return data_root


@pytest.fixture(scope="module")
def split(root):
    return open_split("little", "train", data_root=root)


def loader(split, **changes):
    settings = {
        "subset": np.arange(split.num_images),
        "views": VIEWS,
        "batch_size": 4,
        "seed": 3,
        "backend": "torch",
        "workers": 0,
    }
    return train_loader(split, **(settings | changes))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert (one.epoch, one.step) == (two.epoch, two.step)
        assert np.array_equal(one.indices, two.indices)
        assert torch.equal(one.numbers._buffer, two.numbers._buffer)
        for name in ("original", "crops", "patch_source", "small_crops"):
            mine, other = getattr(one, name), getattr(two, name)
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other), (name, one.step)


def broken(root, folder, *, record, keep):
    """Copy the data set and zero one record after its first bytes; the file keeps its size."""
    shutil.copytree(root, folder)
    split = open_split("little", "train", data_root=folder)
    with split.path.open("r+b") as file:
        file.seek(int(split.pointers[record]) + keep)
        file.write(bytes(int(split.sizes[record]) - keep))
    return split


# ---------------------------------------------------------------------------------------------------------------- batches


def test_batches_follow_the_order_and_carry_shapes_and_labels(split):
    subset = np.arange(1, 20)
    train = loader(split, subset=subset)
    assert train.backend == "torch"
    assert train.steps_per_epoch == 4
    batches = list(train.batches(epoch=2))
    order = subset[epoch_order(19, seed=3, epoch=2)]
    assert np.array_equal(np.concatenate([batch.indices for batch in batches]), order[:16])
    for batch in batches:
        draws, labels = batch.numbers.on(torch.device("cpu"))
        assert np.array_equal(labels, split.labels[batch.indices])
        assert labels.dtype == torch.int64
        assert torch.equal(draws.corners, draw(VIEWS, seed=3, epoch=2, indices=batch.indices).corners)
        assert batch.original.shape == (4, 40, 40, 3)
        assert batch.crops.shape == (4, 2, 32, 32, 3)
        assert batch.patch_source.shape == (4, 48, 48, 3)
        assert batch.original.dtype == batch.crops.dtype == batch.patch_source.dtype == torch.uint8
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    assert loader(split, views=CROPS_ONLY).batches(epoch=0).__next__().patch_source is None


@pytest.mark.parametrize(("interpolation", "rounding"), [("bilinear", 1), ("bicubic", 6)])
def test_views_equal_torchvision_on_pil(split, interpolation, rounding):
    """Those of the student by the filter of the recipe, the original by evaluation's."""
    cutter = Cutter(split=split, views=FOUR_KINDS.model_copy(update={"interpolation": interpolation}), seed=3)
    indices = np.arange(split.num_images)
    compared = 0
    for epoch in range(4):
        plan = cutter.geometry(indices, epoch=epoch)
        originals, crops, sources, small = cutter.cut(indices, epoch=epoch)
        for index in indices.tolist():
            image = decode(split, index)
            if image.width >= image.height:
                expected = F.center_crop(F.resize(image, 44, InterpolationMode.BILINEAR), [40, 40])
                assert np.array_equal(originals[index, 0], np.asarray(expected))
            for view, ours in enumerate((*crops[index], *sources[index], *small[index]), start=1):
                top, left, height, width = plan.boxes[index, view].tolist()
                expected = np.asarray(
                    F.resized_crop(image, top, left, height, width, list(ours.shape[:2]), InterpolationMode(interpolation))
                )
                if height <= width:
                    assert np.array_equal(ours, expected)
                    compared += 1
                else:  # from version 13 on, Pillow may begin with the columns
                    assert np.abs(ours.astype(int) - expected).max() <= rounding
    assert compared > 60


def test_starting_in_the_middle_gives_the_tail(split):
    train = loader(split)
    whole = list(train.batches(epoch=1))
    assert_same(list(train.batches(epoch=1, start_step=3)), whole[3:])
    assert list(train.batches(epoch=1, start_step=5)) == []
    other = list(train.batches(epoch=2))
    assert not np.array_equal(whole[0].indices, other[0].indices)
    same_image = {int(index): batch.crops[row] for batch in whole for row, index in enumerate(batch.indices)}
    assert any(
        not torch.equal(same_image[int(batch.indices[0])], batch.crops[0])
        for batch in other
        if int(batch.indices[0]) in same_image
    )


def test_a_skipped_step_is_not_decoded(split, monkeypatch):
    decoded = []
    monkeypatch.setattr(Cutter, "cut_image", lambda self, index, plan, row, out: decoded.append(index))
    batches = list(loader(split).batches(epoch=0, start_step=4))
    assert sorted(decoded) == sorted(batches[0].indices.tolist())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batches(split, workers):
    assert_same(list(loader(split, workers=workers).batches(epoch=0)), list(loader(split).batches(epoch=0)))


def test_the_ranks_parts_make_the_whole_batch(split):
    whole = list(loader(split).batches(epoch=0))
    parts = [list(loader(split, rank=rank, world_size=2).batches(epoch=0)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert np.array_equal(batch.indices, np.concatenate([part[step].indices for part in parts]))
        labels = [each.numbers.on(torch.device("cpu"))[1] for each in (batch, *(part[step] for part in parts))]
        assert torch.equal(labels[0], torch.cat(labels[1:]))
        for name in ("original", "crops", "patch_source"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part[step], name) for part in parts]))


def test_centre_views_come_in_order_every_one_once(split):
    indices = np.array([3, 1, 9, 7, 20])
    batches = list(centre_loader(split, indices=indices, views=VIEWS, batch_size=2, backend="torch"))
    assert [batch.tolist() for batch, _ in batches] == [[3, 1], [9, 7], [20]]
    views = torch.cat([images for _, images in batches])
    assert views.shape == (5, 40, 40, 3)
    originals = {
        int(index): batch.original[row] for batch in loader(split).batches(epoch=0) for row, index in enumerate(batch.indices)
    }
    known = [(row, index) for row, index in enumerate(indices.tolist()) if index in originals]
    assert known
    assert all(torch.equal(views[row], originals[index]) for row, index in known)


def test_global_random_state_and_threads_are_left_alone(split):
    torch.manual_seed(0)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    list(loader(split, workers=1).batches(epoch=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# ----------------------------------------------------------------------------------------------------------------- errors


def test_batch_sizes_that_cannot_be(split):
    with pytest.raises(UserError, match=r"training.batch_size \(4\) must be a multiple of the number of processes \(3\)"):
        loader(split, world_size=3)
    with pytest.raises(UserError, match=r"training.batch_size \(40\) is larger than the training set \(22 images\)"):
        loader(split, batch_size=40)


def test_backends_that_cannot_be(monkeypatch):
    assert resolve_backend("torch") == "torch"
    with pytest.raises(UserError, match=r"--loader must be auto, ffcv or torch, not 'dali'"):
        resolve_backend("dali")

    def missing(name):
        raise ImportError("No module named 'ffcv'")

    monkeypatch.setattr(loaders.importlib, "import_module", missing)
    assert resolve_backend("auto") == "torch"
    with pytest.raises(UserError, match=r"install obowlab\[ffcv\] or choose torch"):
        resolve_backend("ffcv")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [0, 300])
def test_a_damaged_record_is_named(root, tmp_path, workers, keep):
    split = broken(root, tmp_path / "copy", record=7, keep=keep)
    with pytest.raises(UserError, match=r"Record 7 of .*little.train\.beton cannot be read .* `obowlab data prepare little"):
        list(loader(split, batch_size=11, workers=workers).batches(epoch=0))
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_and_no_wait(split):
    batches = loader(split, workers=1, batch_size=2).batches(epoch=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(UserError, match=r"loader process was killed.*lower --workers"):
        list(batches)


def test_leaving_early_ends_the_workers(split):
    batches = loader(split, workers=2, batch_size=2).batches(epoch=0)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------------------------------- ffcv


@pytest.mark.ffcv
@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resampling_equals_pil_to_the_bit(resampling):
    pytest.importorskip("numba", reason="numba, which comes with ffcv, is not installed")
    from obowlab.views.pil_resize import cut_view, transpose

    rng = np.random.default_rng(0)
    for height, width, resized_height, resized_width in [
        (75, 50, 256, 170),
        (90, 300, 37, 64),
        (64, 64, 32, 32),
        (40, 33, 40, 33),
        (7, 300, 90, 31),
        (1, 2, 9, 8),
    ]:
        pixels = rng.integers(0, 256, (height + 20, width + 20, 3), dtype=np.uint8)
        pixels[:, : width // 2] = 255 * (pixels[:, : width // 2] > 127)  # edges at which a cubic goes beyond 0 and 255
        columns = np.empty((width + 20, height + 20, 3), np.uint8)
        transpose(pixels, columns)
        box = Image.fromarray(pixels[5 : 5 + height, 9 : 9 + width])
        expected = np.asarray(box.resize((resized_width, height), resampling).resize((resized_width, resized_height), resampling))
        side = min(resized_height, resized_width) - 3
        out = np.empty((side, side, 3), np.uint8)
        plan = np.array([5, 9, height, width, resized_height, resized_width, 2, 3, resampling == Image.Resampling.BICUBIC])
        cut_view(columns, plan, np.empty(height * side * 3, np.uint8), out)
        assert np.array_equal(out, expected[2 : 2 + side, 3 : 3 + side])


@pytest.fixture(scope="module")
def compiled(split):
    """One loader for all tests: compiling takes seconds."""
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    threads = torch.get_num_threads()
    train = loader(split, backend="ffcv", workers=2)
    assert train.backend == "ffcv"
    assert torch.get_num_threads() == threads
    return train


@pytest.mark.ffcv
def test_ffcv_gives_the_torch_backends_bytes(split, compiled, monkeypatch):
    given_to_pil = []
    cut_image = Cutter.cut_image
    with monkeypatch.context() as patch:
        patch.setattr(Cutter, "cut_image", lambda self, index, *rest: given_to_pil.append(index) or cut_image(self, index, *rest))
        ours = [list(compiled.batches(epoch=epoch)) for epoch in range(2)]
    assert set(given_to_pil) == {STRAY}
    reference = loader(split)
    for epoch in range(2):
        assert_same(ours[epoch], list(reference.batches(epoch=epoch)))
    assert_same(list(compiled.batches(epoch=1, start_step=3)), ours[1][3:])


@pytest.mark.ffcv
@pytest.mark.parametrize("changes", [{}, {"num_crops": 0, "num_patches": 0}])
def test_crops_of_a_second_size_leave_the_other_views_alone(split, changes):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    views = FOUR_KINDS.model_copy(update=changes)
    ours = list(loader(split, views=views, backend="ffcv", workers=2).batches(epoch=1))
    assert_same(ours, list(loader(split, views=views).batches(epoch=1)))
    assert ours[0].small_crops.shape == (4, 3, 20, 20, 3)
    if not changes:
        for one, plain in zip(ours, loader(split).batches(epoch=1), strict=True):
            assert plain.small_crops is None
            assert all(torch.equal(getattr(one, kind), getattr(plain, kind)) for kind in ("original", "crops", "patch_source"))


@pytest.mark.ffcv
def test_either_backend_resizes_bicubically_what_the_recipe_says(split):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    plain, whole = (next(loader(split, views=views).batches(epoch=1)) for views in (FOUR_KINDS, bicubic()))
    assert torch.equal(plain.original, whole.original)
    for kind in ("crops", "patch_source", "small_crops"):
        assert not torch.equal(getattr(plain, kind), getattr(whole, kind))
    own = FOUR_KINDS.model_copy(update={"per_crop": (CropView(), CropView(interpolation="bicubic"), *[CropView()] * 3)})
    second = next(loader(split, views=own).batches(epoch=1))
    assert torch.equal(second.crops[:, 0], plain.crops[:, 0])
    assert torch.equal(second.crops[:, 1], whole.crops[:, 1])
    assert torch.equal(second.small_crops, plain.small_crops)
    for views in (bicubic(), own):
        ours = list(loader(split, views=views, backend="ffcv", workers=2).batches(epoch=1))
        assert_same(ours, list(loader(split, views=views).batches(epoch=1)))


def test_either_backend_cuts_crops_of_a_resized_image_as_torchvision(split):
    views = CROPS_ONLY.model_copy(update={"crop_extent": "resized"})
    cutter = Cutter(split=split, views=views, seed=3)
    indices = np.arange(split.num_images)
    plan = cutter.geometry(indices, epoch=1)
    _, crops, *_ = cutter.cut(indices, epoch=1)
    compared = 0
    for index in indices.tolist():
        image = F.resize(decode(split, index), views.original_resize, InterpolationMode.BILINEAR)
        for view, ours in enumerate(crops[index], start=1):
            top, left = plan.windows[index, view].tolist()
            expected = np.asarray(F.crop(image, top, left, *ours.shape[:2]))
            assert np.abs(ours.astype(int) - expected).max() <= (0 if image.height <= image.width else 1)
            compared += 1
    assert compared == split.num_images * views.num_crops
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    ours = list(loader(split, views=views, backend="ffcv", workers=2).batches(epoch=1))
    assert_same(ours, list(loader(split, views=views).batches(epoch=1)))


def bicubic():
    return FOUR_KINDS.model_copy(update={"interpolation": "bicubic"})


@pytest.mark.ffcv
def test_ffcv_leaves_no_thread_and_goes_on_after_an_early_end(compiled):
    before = threading.active_count()
    batches = compiled.batches(epoch=0)
    first = next(batches)
    assert threading.active_count() == before + 1
    kept = first.original.clone()
    batches.close()
    assert threading.active_count() == before
    again = list(compiled.batches(epoch=0))
    assert torch.equal(first.original, kept)
    assert torch.equal(again[0].original, kept)
    assert threading.active_count() == before


@pytest.mark.ffcv
def test_ffcv_names_a_damaged_record(root, tmp_path):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    split = broken(root, tmp_path / "copy", record=7, keep=300)
    before = threading.active_count()
    damaged = centre_loader(split, indices=np.arange(22), views=VIEWS, batch_size=3, backend="ffcv", workers=1)
    seen = []
    with pytest.raises(UserError, match=r"Record 7 of .*little.train\.beton cannot be read"):
        seen.extend(indices.tolist() for indices, _ in damaged)
    assert seen == [[0, 1, 2], [3, 4, 5]]
    assert threading.active_count() == before
    with split.path.open("r+b") as file:
        file.truncate(int(split.pointers[20]) + 5)
    with pytest.raises(UserError, match=r"Record 20 of .*beyond the end of the file"):
        loader(split, backend="ffcv")


@pytest.mark.ffcv
@pytest.mark.photos
def test_both_backends_give_the_same_bytes_of_photographs(photos_dir, tmp_path):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    prepare("photos", source=photos_dir / "photos200", data_root=tmp_path)
    photos = open_split("photos", "train", data_root=tmp_path)
    views = Views(num_crops=2, num_patches=5)
    steps = [
        list(loader(photos, views=views, batch_size=10, backend=backend, workers=1).batches(epoch=0, start_step=17))
        for backend in ("ffcv", "torch")
    ]
    assert_same(*steps)
