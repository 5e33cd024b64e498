"""A set that lacks frames of its clips gives the frames that were asked for, or is refused; none other in silence."""

import dataclasses

import numpy as np
import pytest

from configs import folder, grocery, smoke
from data_pipeline.input.batches import clip_batches, train_batches
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.plan import Plan
from data_pipeline.input.sampling import sample_frames
from rice_jax.config import differences, from_json, to_json
from tests.input.test_batches import NUM_CLIPS, TinySplit

PLAIN = FrameOptions(image_size=16, resize=16, flip=False, tail_cut=False)


class Sampled(TinySplit):
    """Clips of 1 to 13 frames, of which a default conversion stored ten at most."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = [sample_frames(int(count), 10) for count in self.columns["original_frames"]]
        self.columns["frames"] = np.array(list(map(len, self.positions)), np.int32)


def train(split: TinySplit, **options: object) -> np.ndarray:
    """Returns the numbers of the stored frames that an epoch shows, [clips, slots]; empty slots are -10."""
    plan = Plan(NUM_CLIPS, NUM_CLIPS, 0)
    with train_batches(split, plan, range(NUM_CLIPS), dataclasses.replace(PLAIN, **options), threads=0) as batches:
        batch = next(batches)
    return np.where(batch["mask"], batch["frames"][:, :, 0, 0, 1].astype(int) - 10, -10)[np.argsort(batch["index"])]


@pytest.mark.parametrize("slots", [2, 4, 10])
def test_random_frames_of_a_set_that_lacks_frames_are_refused_with_the_option(slots: int) -> None:
    message = r'clip clip10: found 10 stored frames of 11, needs all for frame_sampling "random"; .*--frames all'
    with pytest.raises(ValueError, match=message):
        train(Sampled(), frame_sampling="random", num_frames=slots)


def test_random_frames_of_those_stored_are_drawn_when_asked_for_and_are_what_random_draws_of_a_whole_set() -> None:
    drawn = train(Sampled(), frame_sampling="random_of_stored", num_frames=2)
    assert len(set(map(tuple, drawn[9:13].tolist()))) > 1
    whole = [train(TinySplit(), frame_sampling=name, num_frames=2) for name in ("random", "random_of_stored")]
    np.testing.assert_array_equal(*whole)


def test_random_frames_of_those_stored_are_refused_where_all_would_be_taken() -> None:
    with pytest.raises(ValueError, match="needs more than num_frames = 10 to draw from; convert again with --frames"):
        train(Sampled(), frame_sampling="random_of_stored", num_frames=10)


@pytest.mark.parametrize("slots", range(1, 11))
def test_evenly_spaced_frames_are_the_clips_or_refused(slots: int) -> None:
    split = Sampled()
    if slots in (1, 2, 4, 10):
        for row, shown in enumerate(train(split, num_frames=slots)):
            of_clip = sample_frames(int(split.columns["original_frames"][row]), slots)
            assert split.positions[row][shown[shown >= 0]].tolist() == of_clip.tolist()
        clip_batches(split, range(NUM_CLIPS), dataclasses.replace(PLAIN, num_frames=slots), 4).close()
        return
    found = rf"found 10 stored frames of 1[1-3], which lack some of the num_frames = {slots} evenly spaced ones"
    again = "; .*--frames all into another folder, or set .*num_frames to one of \\[1, 2, 4, 10\\]"
    with pytest.raises(ValueError, match=found + again):
        train(split, num_frames=slots)
    with pytest.raises(ValueError, match=found + again):
        clip_batches(split, range(NUM_CLIPS), dataclasses.replace(PLAIN, num_frames=slots), 4)


def test_a_skipped_clip_is_not_asked() -> None:
    short = np.flatnonzero(Sampled().columns["original_frames"] <= 10)
    plan = Plan(NUM_CLIPS, 5, 0, keep=short)
    train_batches(Sampled(), plan, range(5), dataclasses.replace(PLAIN, frame_sampling="random", num_frames=2)).close()


def test_shipped_configs_work_on_a_default_conversion() -> None:
    for config in (grocery.get_config(), folder.get_config(), smoke.get_config()):
        train(Sampled(), frame_sampling=config.data.frame_sampling, num_frames=config.data.num_frames)
        clip_batches(
            Sampled(), range(NUM_CLIPS), dataclasses.replace(PLAIN, num_frames=config.data.eval_num_frames), 4
        ).close()


def test_a_run_of_an_earlier_version_goes_on_with_the_config_that_says_what_it_did() -> None:
    now = grocery.get_config()
    before = from_json(to_json(now).replace("random_of_stored", "random"))
    assert before.data.frame_sampling == "random"
    assert differences(before, now) == []
    assert differences(from_json(to_json(now).replace("random_of_stored", "uniform")), now) == [
        "data.frame_sampling: 'uniform' -> 'random_of_stored'"
    ]
