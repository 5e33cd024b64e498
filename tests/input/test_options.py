"""Frame options: impossible ones are refused."""

import pytest

from data_pipeline.input.options import FrameOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"resize_mode": "squash"},
        {"frame_sampling": "all"},
        {"image_size": 257},
        {"image_size": 0},
        {"num_frames": 0},
        {"min_scale": 0.0},
        {"max_aspect": 0.5},
        {"colour_jitter": 1.5},
        {"white_balance": -0.1},
        {"erase": 1.5},
    ],
    ids=str,
)
def test_impossible_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*: found .*{next(iter(wrong.values()))}.*needs"):
        FrameOptions(**wrong)
