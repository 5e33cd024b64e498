"""Batches: the same for any threads and workers, every row in its place, nothing on a device, nothing left running."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.convert import Options, convert
from data_pipeline.format.reader import Dataset, open_dataset
from data_pipeline.format.schema import Frame
from data_pipeline.format.tfrecord import frame_record, index_path, unframe_record
from data_pipeline.input.augment import FIRST_FRAME, SHOP_IMAGE, WHOLE_CLIP, augment_words
from data_pipeline.input.batches import PART_EXAMPLES, Batches, clip_batches, image_batches, train_batches
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.plan import Plan, rows_without
from data_pipeline.input.sampling import sample_frames
from tests.proc import children, until_gone

NUM_CLIPS, NUM_IMAGES = 23, 7
OPTIONS = FrameOptions(image_size=12, resize=16)
PLAIN = FrameOptions(image_size=16, resize=16, flip=False, tail_cut=False)  # nothing random but the order


@dataclasses.dataclass(frozen=True)
class Record:
    id: str
    frames: list[Frame]
    encoded: bytes = b""


class TinySplit:
    """Clip i has 1 + i % 13 frames. The red and green of each picture name its clip and frame."""

    name, path = "train", Path("tiny")
    num_clips, num_images = NUM_CLIPS, NUM_IMAGES

    def __init__(self) -> None:
        rows = np.arange(NUM_CLIPS, dtype=np.int32)
        count = 1 + rows % 13
        self.columns = {"image": rows % NUM_IMAGES, "product": rows % 5, "frames": count, "original_frames": count}
        self.clip_ids = [f"clip{row}" for row in rows]
        self.image_ids = [f"image{row}" for row in range(NUM_IMAGES)]

    def clip(self, row: int) -> Record:
        return Record(
            self.clip_ids[row], [Frame(png((row, 10 + k, 0)), "", k) for k in range(self.columns["frames"][row])]
        )

    def where(self, kind: str, row: int) -> str:
        return f"{self.path} {self.name} row {row}"

    def image(self, row: int) -> Record:
        return Record(self.image_ids[row], [], png((200, row, 0)))


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((16, 16, 3), colour, np.uint8)
    pixels[:, :, 2] = np.add.outer(np.arange(16), 16 * np.arange(16))  # blue names each pixel, and so the crop
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def split() -> TinySplit:
    return TinySplit()


def take(batches: Batches, count: int) -> list[dict[str, np.ndarray]]:
    with batches:
        return [next(batches) for _ in range(count)]


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_rows_of_the_plan_in_its_order(split):
    plan = Plan(NUM_CLIPS, 5, 3)
    for step, batch in enumerate(take(train_batches(split, plan, range(5), PLAIN), 9)):
        rows = plan.batch(step)
        assert batch["index"].tolist() == rows.tolist()
        assert batch["product"].tolist() == (rows % 5).tolist()
        assert batch["image"][:, 0, 0, 1].tolist() == (rows % NUM_IMAGES).tolist()
        assert batch["frames"][:, 0, 0, 0, 0].tolist() == rows.tolist()
        assert batch["mask"].sum(axis=1).tolist() == np.minimum(10, 1 + rows % 13).tolist()


def test_shapes_and_types_are_as_promised(split):
    batch = take(train_batches(split, Plan(NUM_CLIPS, 5, 3), [4, 0, 2], OPTIONS), 1)[0]
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert shapes == {
        "frames": ((3, 10, 12, 12, 3), "uint8"),
        "mask": ((3, 10), "int32"),
        "image": ((3, 12, 12, 3), "uint8"),
        "product": ((3,), "int32"),
        "index": ((3,), "int32"),
    }


def test_empty_slots_are_zero_and_masked_and_come_last(split):
    for batch in take(train_batches(split, Plan(NUM_CLIPS, 23, 0), range(23), OPTIONS), 4):
        assert np.all(np.diff(batch["mask"], axis=1) <= 0)
        assert np.all(batch["mask"][:, 0] == 1)
        assert not batch["frames"][batch["mask"] == 0].any()
        assert batch["frames"][batch["mask"] == 1].any(axis=(1, 2, 3)).all()


def test_a_clip_longer_than_the_slots_shows_sampled_frames_from_both_ends(split):
    batch = take(clip_batches(split, [12], PLAIN, 1), 1)[0]
    shown = (batch["frames"][0, :, 0, 0, 1] - 10).tolist()
    assert shown == sample_frames(13, 10).tolist()
    few = dataclasses.replace(PLAIN, num_frames=4)
    assert (take(clip_batches(split, [12], few, 1), 1)[0]["frames"][0, :, 0, 0, 1] - 10).tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize(("threads", "workers"), [(1, 0), (4, 0), (0, 2), (2, 1)])
def test_batches_are_the_same_for_any_number_of_threads_and_workers(split, threads, workers):
    plan = Plan(NUM_CLIPS, 23, 1)
    rows = np.tile(np.arange(23), 4)[:80]  # three elements a batch
    assert len(rows) > 2 * PART_EXAMPLES
    expected = take(train_batches(split, plan, rows, OPTIONS, threads=0), 3)
    actual = take(train_batches(split, plan, rows, OPTIONS, threads=threads, workers=workers), 3)
    assert_same(actual, expected)


def test_processes_rows_make_up_the_global_batch_also_when_not_contiguous(split):
    plan = Plan(NUM_CLIPS, 8, 5)
    whole = take(train_batches(split, plan, range(8), OPTIONS), 4)
    for shares in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]], [[6], [3, 0], [7, 5, 4, 2, 1]]):
        for share in shares:
            part = take(train_batches(split, plan, share, OPTIONS), 4)
            assert_same(part, [{name: array[share] for name, array in batch.items()} for batch in whole])


def test_starting_in_mid_epoch_equals_an_undisturbed_run(split):
    plan = Plan(NUM_CLIPS, 5, 2)
    undisturbed = take(train_batches(split, plan, range(5), OPTIONS), 13)
    for start in (1, 3, 4, 9):
        resumed = take(train_batches(split, plan, range(5), OPTIONS, start_step=start, threads=3), 13 - start)
        assert_same(resumed, undisturbed[start:])


def test_an_epoch_trains_on_every_clip_once_but_n_mod_g(split):
    plan = Plan(NUM_CLIPS, 5, 2)
    batches = take(train_batches(split, plan, range(5), OPTIONS), 8)
    for epoch in range(2):
        seen = np.concatenate([batch["index"] for batch in batches[4 * epoch : 4 * epoch + 4]]).tolist()
        assert len(set(seen)) == 20
        assert sorted(seen + plan.left_out(epoch).tolist()) == list(range(NUM_CLIPS))


def test_augmentation_changes_with_the_epoch_and_with_the_seed_only(split):
    def first_clip(seed: int, step: int) -> np.ndarray:
        plan = Plan(NUM_CLIPS, NUM_CLIPS, seed)
        batch = take(train_batches(split, plan, range(NUM_CLIPS), OPTIONS, start_step=step), 1)[0]
        return batch["frames"][batch["index"] == 0]

    assert np.array_equal(first_clip(0, 0), first_clip(0, 0))
    assert not np.array_equal(first_clip(0, 0), first_clip(0, 1))
    assert not np.array_equal(first_clip(0, 0), first_clip(1, 0))


def test_skipping_a_clip_leaves_the_augmentation_of_the_others_alone(split):
    def by_clip(plan: Plan) -> dict[int, np.ndarray]:
        batch = take(train_batches(split, plan, range(plan.batch_size), OPTIONS), 1)[0]
        return dict(zip(batch["index"].tolist(), batch["frames"], strict=True))

    whole = by_clip(Plan(NUM_CLIPS, NUM_CLIPS, 0))
    keep = rows_without(split.clip_ids, ["clip4", "clip20"])
    rest = by_clip(Plan(NUM_CLIPS, NUM_CLIPS - 2, 0, keep=keep))
    assert rest.keys() == whole.keys() - {4, 20}
    for row, clip in rest.items():
        np.testing.assert_array_equal(clip, whole[row])


def test_frames_of_a_clip_are_augmented_alike_only_with_consistent_augment(split):
    def crops(consistent: bool) -> list[int]:
        """How many different crops and flips the frames of each clip have, by their blue."""
        options = dataclasses.replace(OPTIONS, consistent_augment=consistent, tail_cut=False)
        batch = take(train_batches(split, Plan(NUM_CLIPS, NUM_CLIPS, 0), range(NUM_CLIPS), options), 1)[0]
        return [
            len({frame[..., 2].tobytes() for frame in clip[mask == 1]})
            for clip, mask in zip(batch["frames"], batch["mask"], strict=True)
        ]

    assert set(crops(True)) == {1}
    assert max(crops(False)) > 5


def test_cached_pictures_are_the_same_pixels_within_the_bytes_allowed(split):
    plan = Plan(NUM_CLIPS, 5, 2)
    expected = take(train_batches(split, plan, range(5), OPTIONS), 12)
    assert_same(take(train_batches(split, plan, range(5), OPTIONS, cache_bytes=10**6, threads=3), 12), expected)
    assert_same(take(train_batches(split, plan, range(5), OPTIONS, cache_bytes=5000), 12), expected)


def test_a_cached_record_is_not_read_again(split):
    class Counting(TinySplit):
        reads = 0

        def clip(self, row: int) -> Record:
            self.reads += 1
            return super().clip(row)

    counting = Counting()
    options = dataclasses.replace(OPTIONS, tail_cut=False)
    take(train_batches(counting, Plan(NUM_CLIPS, 23, 2), range(23), options, cache_bytes=10**7, threads=0), 5)
    assert counting.reads == NUM_CLIPS
    counting.reads = 0
    take(
        train_batches(counting, Plan(NUM_CLIPS, 23, 2), range(23), options, cache_bytes=16 * 16 * 3 * 20, threads=0), 2
    )
    assert NUM_CLIPS < counting.reads < 2 * NUM_CLIPS


def test_no_more_batches_are_read_ahead_than_prefetch_batches():
    class Counting(TinySplit):
        reads = 0

        def image(self, row: int) -> Record:
            self.reads += 1
            return super().image(row)

    counting = Counting()
    with train_batches(counting, Plan(NUM_CLIPS, 5, 0), range(5), OPTIONS, threads=2, prefetch_batches=3) as batches:
        next(batches)
        time.sleep(0.5)
        assert counting.reads <= 5 * (1 + 3)  # Grain's own default would be 500 batches


@pytest.mark.parametrize("rows", [[], [5], [-1], [[0, 1]]])
def test_rows_outside_the_batch_are_refused(split, rows):
    with pytest.raises(ValueError, match="needs positions of 0 to 4"):
        train_batches(split, Plan(NUM_CLIPS, 5, 0), rows, OPTIONS)


def test_more_slots_than_stored_frames_name_the_option_to_convert_with(split):
    longer = TinySplit()
    longer.columns["original_frames"] = longer.columns["frames"] * 3
    message = r"clip clip0: found 1 stored frame of 3, needs num_frames = 10.*; convert again with --frames all into"
    with pytest.raises(ValueError, match=message):
        clip_batches(longer, range(NUM_CLIPS), OPTIONS, 4)
    with pytest.raises(ValueError, match=message):
        train_batches(longer, Plan(NUM_CLIPS, 5, 0), range(5), OPTIONS)
    few = dataclasses.replace(OPTIONS, num_frames=4)
    clip_batches(longer, [12], few, 4).close()  # four evenly spaced frames of 39 are among 13 evenly spaced ones


def test_a_clip_without_shop_image_cannot_be_trained_on_unless_skipped(split):
    lonely = TinySplit()
    lonely.columns["image"] = np.where(np.arange(NUM_CLIPS) == 6, -1, lonely.columns["image"])
    with pytest.raises(ValueError, match=r"clip clip6: found no shop image .* list them in skip_clips"):
        train_batches(lonely, Plan(NUM_CLIPS, 5, 0), range(5), OPTIONS)
    keep = rows_without(lonely.clip_ids, ["clip6"])
    train_batches(lonely, Plan(NUM_CLIPS, 5, 0, keep=keep), range(5), OPTIONS).close()


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 23, 40, 70])
def test_every_clip_comes_exactly_once_and_padding_is_marked(split, batch_size):
    rows = np.random.default_rng(0).permutation(NUM_CLIPS)
    batches = clip_batches(split, rows, OPTIONS, batch_size)
    assert batches.num_batches == -(-NUM_CLIPS // batch_size)
    batches = list(batches)
    assert all(len(array) == batch_size for batch in batches for array in batch.values())
    valid = np.concatenate([batch["valid"] for batch in batches])
    given = np.concatenate([batch["row"] for batch in batches])
    assert valid.sum() == NUM_CLIPS
    assert given[valid].tolist() == rows.tolist()
    assert set(given[~valid].tolist()) <= {-1}
    for batch in batches:
        assert batch["frames"][batch["valid"], 0, 0, 0, 0].tolist() == batch["row"][batch["valid"]].tolist()
        assert not batch["frames"][~batch["valid"]].any()
        assert np.all(batch["mask"][~batch["valid"]].sum(axis=1) == 1)  # no mean over no frames


@pytest.mark.parametrize("batch_size", [1, 3, 7, 40])
def test_every_shop_image_comes_exactly_once(split, batch_size):
    batches = list(image_batches(split, range(NUM_IMAGES), OPTIONS, batch_size))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.concatenate([batch["row"] for batch in batches])[valid].tolist() == list(range(NUM_IMAGES))
    assert np.concatenate([batch["image"] for batch in batches])[valid, 0, 0, 1].tolist() == list(range(NUM_IMAGES))


def test_a_hosts_rows_may_contain_padding_already(split):
    batches = list(clip_batches(split, [3, 4, -1, 5, -1, -1], OPTIONS, 3))
    assert [batch["row"].tolist() for batch in batches] == [[3, 4, -1], [5, -1, -1]]
    assert [batch["valid"].tolist() for batch in batches] == [[True, True, False], [True, False, False]]
    assert all(batch["mask"].any(axis=1).all() for batch in batches)


def test_no_rows_give_no_batches(split):
    assert list(clip_batches(split, [], OPTIONS, 4)) == []


def test_evaluation_takes_the_centre_of_every_sampled_frame_and_nothing_random(split):
    batches = list(clip_batches(split, range(NUM_CLIPS), OPTIONS, 5))
    assert_same(list(clip_batches(split, range(NUM_CLIPS), OPTIONS, 5, seed=9, threads=0, workers=0)), batches)
    mask = np.concatenate([batch["mask"] for batch in batches])[:NUM_CLIPS]
    assert mask.sum(axis=1).tolist() == [min(10, 1 + row % 13) for row in range(NUM_CLIPS)]
    expected = np.add.outer(np.arange(16), 16 * np.arange(16))[2:14, 2:14]
    np.testing.assert_array_equal(batches[0]["frames"][0, 0, :, :, 2], expected)


def test_tail_cut_in_evaluation_depends_on_the_seed_and_the_clip_alone(split):
    options = dataclasses.replace(OPTIONS, test_tail_cut=True)
    long = [row for row in range(NUM_CLIPS) if row % 13 >= 9]

    def kept(rows: list[int], seed: int) -> dict[int, int]:
        batches = list(clip_batches(split, rows, options, 3, seed=seed))
        return {
            int(r): int(m.sum()) for b in batches for r, m, v in zip(b["row"], b["mask"], b["valid"], strict=True) if v
        }

    drawn = [kept(long, seed) for seed in range(6)]
    assert drawn == [kept(long[::-1], seed) for seed in range(6)]
    assert len({tuple(sorted(of_seed.items())) for of_seed in drawn}) > 1
    assert any(count < 10 for of_seed in drawn for count in of_seed.values())


@pytest.mark.parametrize("rows", [[NUM_CLIPS], [-2], [[0]]])
def test_rows_outside_the_split_are_refused(split, rows):
    with pytest.raises(ValueError, match="needs 0 to 22"):
        clip_batches(split, rows, OPTIONS, 4)


# --- errors -----------------------------------------------------------------------------------------------------------


class OneBadPicture(TinySplit):
    def clip(self, row: int) -> Record:
        record = super().clip(row)
        if row == 8:
            record.frames[6] = Frame(record.frames[6].encoded[:40], "", 6)
        return record


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (2, 0), (1, 1)])
def test_a_bad_picture_stops_the_run_with_its_name(threads, workers):
    plan = Plan(NUM_CLIPS, 23, 0)
    options = dataclasses.replace(OPTIONS, tail_cut=False)
    with train_batches(OneBadPicture(), plan, range(23), options, threads=threads, workers=workers) as batches:
        with pytest.raises(ValueError, match=r"tiny train row 8 \(clip clip8\): frame 7 of 9 .*needs.*skip_clips"):
            next(batches)
        with pytest.raises(ValueError, match="were closed"):  # nothing after a bad record is returned
            next(batches)


class Crash(TinySplit):
    def clip(self, row: int) -> Record:
        return os._exit(7) if row == 8 else super().clip(row)


def test_a_worker_that_dies_ends_the_run_and_does_not_hang_it():
    with (
        train_batches(Crash(), Plan(NUM_CLIPS, 23, 0), range(23), OPTIONS, workers=1) as batches,
        pytest.raises(RuntimeError, match="terminated unexpectedly with exit code 7"),
    ):
        next(batches)


def test_skip_clips_goes_on_without_the_bad_one():
    bad = OneBadPicture()
    plan = Plan(NUM_CLIPS, 22, 0, keep=rows_without(bad.clip_ids, ["clip8"]))
    assert 8 not in take(train_batches(bad, plan, range(22), OPTIONS), 1)[0]["index"].tolist()


def test_closed_batches_raise_an_error_that_says_so(split):
    batches = train_batches(split, Plan(NUM_CLIPS, 5, 0), range(5), OPTIONS)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="were closed"):
        next(batches)


@pytest.mark.parametrize("wrong", [{"threads": -1}, {"workers": -1}, {"prefetch_batches": 0}])
def test_impossible_numbers_of_threads_workers_or_batches_are_refused(split, wrong):
    with pytest.raises(ValueError, match="needs 0 or more threads and workers"):
        train_batches(split, Plan(NUM_CLIPS, 5, 0), range(5), OPTIONS, **wrong)


# --- from a download through records ----------------------------------------------------------------------------------

SIZES = [(40, 30), (64, 64), (33, 50), (16, 16)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clips of 1 to 33 JPEG, PNG and grey frames of many sizes, as a user has LPR750K; three shop images."""
    root = tmp_path_factory.mktemp("lpr750k")
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)

    def write(path: str, number: int) -> str:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = coarse.resize(SIZES[number % len(SIZES)]).convert("L" if number % 5 == 4 else "RGB")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path)
        return path

    images = [write(f"training_image/{uuid(900 + i)}.jpg", i) for i in range(3)]
    rows = []
    for clip, count in enumerate([1, 2, 9, 10, 11, 12, 20, 33, 10]):
        clip_id = f"{uuid(clip // 3)}-{10**12 + clip}-{10**12 + 5000 + clip}"
        suffix = "png" if clip == 2 else "jpg"
        listed = [write(f"training_video_00/{clip_id}/{clip_id}-{k:04d}.{suffix}", k) for k in range(count)]
        image = images[clip % 3]
        rows.append(
            "\t".join([clip_id, repr(listed), "[]", Path(image).stem, image, "Tea", "7", "Food", "spu1", "Hello."])
        )
    (root / "annotations" / "training_videoinfo_641821.txt").write_text("\n".join(rows) + "\n")
    return root


def uuid(number: int) -> str:
    return f"{number:08x}-0000-1000-8000-{number:012x}"


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    output = tmp_path_factory.mktemp("converted")
    convert(Options("lpr750k", source, output, splits=("train",), clips_per_shard=4))
    return open_dataset(output)


def by_hand(path: Path, options: FrameOptions, words: np.ndarray | None) -> np.ndarray:
    """One picture by Pillow alone, as docs/official.md 9.5 says. words None: as in evaluation."""
    image = Image.open(path).convert("RGB").resize((options.resize, options.resize), Image.Resampling.BILINEAR)
    spare = options.resize - options.image_size
    y = x = spare // 2
    flip = 0
    if words is not None:
        y, x, flip = (int(word) * below >> 64 for word, below in zip(words[:3], (spare + 1, spare + 1, 2), strict=True))
    image = image.crop((x, y, x + options.image_size, y + options.image_size))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_equal_pillow_on_the_files_of_the_download(source, converted, workers):
    split = converted.split("train")
    listed = {
        row.split("\t")[0]: row.split("\t") for row in next((source / "annotations").iterdir()).read_text().splitlines()
    }
    options = FrameOptions(image_size=20, resize=24)
    plan = Plan(9, 4, 5, content_hash=converted.content_hash)
    for step, batch in enumerate(take(train_batches(split, plan, range(4), options, workers=workers), 4)):
        epoch = plan.epoch(step)
        for place, row in enumerate(plan.batch(step).tolist()):
            fields = listed[split.clip_ids[row]]
            paths = json.loads(fields[1].replace("'", '"'))
            gate, fraction = (int(word) * 10 >> 64 for word in augment_words(5, epoch, row, WHOLE_CLIP, 2))
            chosen = np.linspace(0, len(paths) - 1, min(10, len(paths))).astype(int)
            if len(chosen) == 10 and gate >= 5:
                chosen = chosen[: 10 - fraction]
            assert batch["mask"][place].tolist() == [1] * len(chosen) + [0] * (10 - len(chosen))
            for slot, position in enumerate(chosen):
                words = augment_words(5, epoch, row, FIRST_FRAME + slot)
                expected = by_hand(source / paths[position], options, words)
                np.testing.assert_array_equal(batch["frames"][place, slot], expected)
            expected = by_hand(source / fields[4], options, augment_words(5, epoch, row, SHOP_IMAGE))
            np.testing.assert_array_equal(batch["image"][place], expected)


def test_evaluation_batches_equal_pillow_on_the_files_of_the_download(source, converted):
    split = converted.split("train")
    options = FrameOptions(image_size=20, resize=24)
    for batch in image_batches(split, range(split.num_images), options, 2):
        for row, valid, image in zip(batch["row"], batch["valid"], batch["image"], strict=True):
            if valid:
                path = source / "training_image" / f"{split.image_ids[row]}.jpg"
                np.testing.assert_array_equal(image, by_hand(path, options, None))


def test_a_damaged_record_is_named_with_shard_record_and_clip(converted, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(converted.path, path)
    shard = sorted(path.glob("train-clips-*.tfrecord"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    split = open_dataset(path).split("train")
    with pytest.raises(ValueError, match=r"skip_clips") as caught:
        list(clip_batches(split, range(split.num_clips), OPTIONS, 4))
    message = str(caught.value)
    named = re.match(rf"clip (\S+): \S*{re.escape(shard.name)} record (\d): .*checksum", message)
    assert named[1] == split.clip_ids[4 + int(named[2])]  # four clips a shard, and it is the second


def test_a_picture_that_cannot_be_decoded_is_named_with_shard_and_record(converted, tmp_path):
    """The record's checksum agrees: a conversion refuses such a picture, but another writer may not."""
    path = tmp_path / "copy"
    shutil.copytree(converted.path, path)
    shard = sorted(path.glob("train-clips-*.tfrecord"))[1]
    begin, end = np.frombuffer(index_path(shard).read_bytes(), "<u8")[2:4].astype(int)
    data = shard.read_bytes()
    record = unframe_record(data[begin:end]).replace(b"\xff\xd8\xff", b"abc", 1)
    shard.write_bytes(data[:begin] + frame_record(record) + data[end:])
    split = open_dataset(path).split("train")
    named = rf"{re.escape(str(shard))} record 2 \(clip {split.clip_ids[6]}\): frame 1 of \d+ .*skip_clips"
    with pytest.raises(ValueError, match=named):
        list(clip_batches(split, range(split.num_clips), OPTIONS, 4))


# --- processes --------------------------------------------------------------------------------------------------------

PROGRAM = textwrap.dedent(
    """
    import multiprocessing, os, sys
    import jax
    from data_pipeline.input.batches import train_batches
    from data_pipeline.input.plan import Plan
    from tests.input.test_batches import NUM_CLIPS, OPTIONS, TinySplit
    from jax._src import xla_bridge

    class NoBackend(TinySplit):
        def clip(self, row):
            assert not xla_bridge._backends, xla_bridge._backends
            in_worker = multiprocessing.parent_process() is not None
            assert in_worker == (sys.argv[1] != "0")
            assert not in_worker or (jax.config.jax_platforms, os.environ["JAX_PLATFORMS"]) == ("cpu", "cpu")
            return super().clip(row)

    if __name__ == "__main__":
        batches = train_batches(NoBackend(), Plan(NUM_CLIPS, 5, 0), range(5), OPTIONS, workers=int(sys.argv[1]))
        next(batches)
        assert not xla_bridge._backends, xla_bridge._backends
        print("ready", flush=True)
        if sys.argv[2] == "wait":
            sys.stdin.read()
        if sys.argv[2] == "raise":
            raise KeyError("planned")
    """
)


def start(folder: Path, workers: int, ending: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.Popen(
        [sys.executable, str(program), str(workers), ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": root},
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_no_jax_backend_is_touched_and_unclosed_batches_end_without_a_word(tmp_path, workers):
    output, errors = start(tmp_path, workers, "leave").communicate(timeout=120)
    assert (output, errors) == ("ready\n", "")


def test_an_error_elsewhere_is_the_only_traceback(tmp_path):
    process = start(tmp_path, 1, "raise")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyError: 'planned'")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_workers_die_with_their_parent_even_after_kill_9(tmp_path):
    with start(tmp_path, 2, "wait") as process:
        assert process.stdout.readline() == "ready\n"
        workers = children(process.pid)
        assert len(workers) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        until_gone(workers)
