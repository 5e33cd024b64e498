"""The options by which clips become frames of one size, with their checks."""

import dataclasses
from typing import Literal, get_args

FrameSampling = Literal["uniform", "random", "random_of_stored"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Options of frames and pictures as arrays. The defaults are the official code's (docs/official.md 9).

    Evaluation takes evenly spaced frames and centre crops. What is random happens in training only, except for
    test_tail_cut.

    Attributes:
      image_size: side of the square picture that the network sees, in pixels.
      resize: pixels before the crop: of both sides ("stretch"), or of the shorter side ("keep_ratio").
      resize_mode: "stretch" makes a square, bilinearly, as RICE does. "keep_ratio" keeps the aspect ratio, bicubically,
        as CLIP does (docs/official.md 11, row 17).
      num_frames: slots of a clip, N.
      frame_sampling: "uniform" takes evenly spaced frames. "random" draws any num_frames frames of the clip, in their
        order; the data set must store all frames. "random_of_stored" draws from the frames that are stored, such as the
        ten evenly spaced ones of a default conversion.
      tail_cut: with probability 0.5, a clip that fills every slot keeps only its first 1 to num_frames frames
        (docs/official.md 9.2).
      test_tail_cut: the same cut in evaluation, as the official code does (docs/official.md 11, row 15).
      flip: mirror a picture with probability 0.5.
      consistent_augment: all frames of a clip share crop, flip, colours, erased square (docs/official.md 11, row 16).
      min_scale: below 1, a crop has a random share of the area, at least this, and is resized to image_size, in place
        of resize and crop.
      max_aspect: largest factor by which such a crop's width : height differs from 1, either way. Above 1, crops are
        made in this way even if min_scale is 1.
      shrink_to: longest shorter side, in pixels, of the picture that such a crop is taken from; 0 never shrinks it.
      colour_jitter: brightness, contrast and saturation are scaled by 1 - colour_jitter to 1 + colour_jitter.
      white_balance: red, green and blue are scaled, each by 1 - white_balance to 1 + white_balance.
      erase: probability that a square of 0.2 to 0.5 of the side is painted over.
      apply_exif: rotate pictures by their EXIF orientation, which the official code does not do.
      to_srgb: convert the colours of pictures with another ICC profile to sRGB, which the official code does not do.

    Raises ValueError if a field is outside its range. The message names the field, the value and the range.

    Example:
        from data_pipeline import FrameOptions

        options = FrameOptions(image_size=224, resize=256, num_frames=10)
        assert options.resize_mode == "stretch"
    """

    image_size: int = 224
    resize: int = 256
    resize_mode: Literal["stretch", "keep_ratio"] = "stretch"
    num_frames: int = 10
    frame_sampling: FrameSampling = "uniform"
    tail_cut: bool = True
    test_tail_cut: bool = False
    flip: bool = True
    consistent_augment: bool = False
    min_scale: float = 1.0
    max_aspect: float = 1.0
    shrink_to: int = 0
    colour_jitter: float = 0.0
    white_balance: float = 0.0
    erase: float = 0.0
    apply_exif: bool = False
    to_srgb: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("resize_mode", ("stretch", "keep_ratio")), ("frame_sampling", get_args(FrameSampling))):
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
