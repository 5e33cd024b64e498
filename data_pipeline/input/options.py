"""How clips become frames of one size: the options, checked."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """How pictures become arrays; the defaults are the official code's (SPEC 9), sizes in pixels.

    Only training crops, flips, cuts and jitters at random; evaluation takes the centre crop of every sampled frame.
    """

    image_size: int = 224  # side of what the network sees
    resize: int = 256  # before the crop: both sides ("stretch") or the shorter one ("keep_ratio")
    resize_mode: Literal["stretch", "keep_ratio"] = "stretch"  # bilinear as RICE, or bicubic as CLIP (SPEC 11, row 17)
    num_frames: int = 10  # slots of a clip
    frame_sampling: Literal["uniform", "random"] = "uniform"  # "random", in training: any num_frames, in order
    tail_cut: bool = True  # in training, half of the clips that fill every slot lose a random tail (SPEC 9.2)
    test_tail_cut: bool = False  # the same in evaluation, as the official code does unasked (SPEC 11, row 15)
    flip: bool = True  # mirror, with chance one half
    consistent_augment: bool = False  # one crop, flip and colour for all frames of a clip (SPEC 11, row 16)
    min_scale: float = 1.0  # below 1: crop a random share of the area, at least this much, in place of resize + crop
    max_aspect: float = 1.0  # above 1: that crop's width : height is off by up to this factor, either way
    shrink_to: int = 0  # such crops are of a picture whose shorter side is at most this; 0: of the picture as it is
    colour_jitter: float = 0.0  # brightness, contrast and saturation times 1 - c to 1 + c
    white_balance: float = 0.0  # red, green and blue, each times 1 - w to 1 + w
    erase: float = 0.0  # chance that a square of 0.2 to 0.5 of the side is painted over
    apply_exif: bool = False  # turn pictures as their EXIF orientation says; the official code does not

    def __post_init__(self) -> None:
        for name, allowed in (("resize_mode", ("stretch", "keep_ratio")), ("frame_sampling", ("uniform", "random"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, needs one of {', '.join(allowed)}.")
        if not 1 <= self.image_size <= self.resize:
            raise ValueError(f"image_size: found {self.image_size}, needs 1 to resize ({self.resize}); set both.")
        if self.shrink_to and self.shrink_to < self.image_size:
            raise ValueError(f"shrink_to: found {self.shrink_to}, needs 0 or at least image_size, {self.image_size}.")
        if self.num_frames < 1:
            raise ValueError(f"num_frames: found {self.num_frames}, needs at least 1.")
        if not 0 < self.min_scale <= 1 or not self.max_aspect >= 1:
            raise ValueError(
                f"min_scale, max_aspect: found {self.min_scale}, {self.max_aspect}; "
                "needs 0 < min_scale <= 1 <= max_aspect."
            )
        for name in ("colour_jitter", "white_balance", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, needs 0 to 1.")

    @property
    def crops_at_random_scale(self) -> bool:
        return self.min_scale < 1 or self.max_aspect > 1
