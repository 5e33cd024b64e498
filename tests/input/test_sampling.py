"""Frame sampling: the official processor's frames, every subset and every cut equally likely."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.input.augment import WHOLE_CLIP, augment_words
from data_pipeline.input.options import FrameOptions
from data_pipeline.input.sampling import choose_frames, frames_kept, sample_frames

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fixture_temporal.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["no_cut"], ids=lambda case: f"{case['frames']} frames")
def test_sampling_agrees_with_the_official_processor(case):
    indices = sample_frames(case["frames"], 10).tolist()
    assert indices == [index for index in case["indices"] if index >= 0]
    assert len(indices) == sum(case["mask"])


@pytest.mark.parametrize("case", GOLDEN["official_train_and_test"], ids=lambda case: str(list(case.values())[:3]))
def test_tail_cut_agrees_with_the_official_processor(case):
    indices = sample_frames(case["frames"], 10)
    gate, fraction = round(10 * (case["gate"] or 0)), round(10 * (case["fraction"] or 0))
    kept = frames_kept(len(indices), 10, gate, fraction)
    assert indices[:kept].tolist() == [index for index in case["indices"] if index >= 0]


def test_sampling_agrees_with_numpys_linspace_for_ten_slots():
    for count in range(11, 3000):
        assert sample_frames(count, 10).tolist() == np.linspace(0, count - 1, 10).astype(int).tolist()


@pytest.mark.parametrize("slots", [1, 2, 3, 10, 25])
def test_sampling_keeps_order_and_both_ends_for_any_number_of_slots(slots):
    for count in range(1, 60):
        indices = sample_frames(count, slots)
        assert len(indices) == min(count, slots)
        assert np.all(np.diff(indices) > 0)
        assert indices[0] == 0
        assert indices[-1] == (count - 1 if slots > 1 else 0)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="found 0 frames, needs at least 1"):
        sample_frames(0, 10)


def words_of_clip(example: int) -> np.ndarray:
    return augment_words(0, 0, example, WHOLE_CLIP, 12)


def test_tail_cut_keeps_ten_half_of_the_time_and_else_one_to_ten_alike():
    options = FrameOptions()
    kept = Counter(len(choose_frames(30, options, words_of_clip(e), train=True)) for e in range(4000))
    assert set(kept) == set(range(1, 11))
    expected = {n: 4000 * (0.05 + 0.5 * (n == 10)) for n in range(1, 11)}
    assert sum((kept[n] - expected[n]) ** 2 / expected[n] for n in kept) < 27.9  # 9 degrees of freedom, once in 1,000


def test_tail_cut_spares_short_clips_and_evaluation():
    options = FrameOptions()
    for example in range(200):
        for count in range(1, 10):
            assert len(choose_frames(count, options, words_of_clip(example), train=True)) == count
        assert len(choose_frames(10, options, words_of_clip(example), train=False)) == 10
    uncut = FrameOptions(tail_cut=False)
    assert all(len(choose_frames(10, uncut, words_of_clip(e), train=True)) == 10 for e in range(200))


def test_tail_cut_in_evaluation_is_the_same_cut_when_asked_for():
    tested = FrameOptions(test_tail_cut=True, tail_cut=False)
    trained = FrameOptions()
    for example in range(100):
        in_test = choose_frames(40, tested, words_of_clip(example), train=False)
        assert in_test.tolist() == choose_frames(40, trained, words_of_clip(example), train=True).tolist()


def test_random_sampling_draws_every_subset_alike_and_in_order():
    options = FrameOptions(num_frames=2, frame_sampling="random", tail_cut=False)
    counts = Counter(
        tuple(choose_frames(5, options, augment_words(0, 0, e, WHOLE_CLIP, 4), train=True).tolist())
        for e in range(2000)
    )
    assert set(counts) == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.9  # 9 degrees of freedom, once in 1,000
    evaluated = choose_frames(5, options, augment_words(0, 0, 1, WHOLE_CLIP, 4), train=False)
    assert evaluated.tolist() == [0, 4]
