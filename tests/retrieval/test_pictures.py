"""Pictures of Pillow: `prepare` shows them as it shows their files."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipeline.input.options import FrameOptions
from rice_jax.retrieval.pictures import prepare

OPTIONS = FrameOptions(num_frames=1, image_size=4, resize=4, apply_exif=True, to_srgb=True)
CLEAR = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def deep(level: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.full((4, 4), level, dtype))


KINDS: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "16 bits": (deep(30000, "u2"), "PNG", {}),
    "16 bits, TIFF": (deep(30000, "u2"), "TIFF", {}),
    "16 bits, big endian": (Image.frombytes("I;16B", (4, 4), np.full(16, 30000, ">u2").tobytes()), "TIFF", {}),
    "32 bits": (deep(30000, "i4"), "TIFF", {}),
    "all of 32 bits": (deep(2**30, "i4"), "TIFF", {}),
    "floats to 1": (deep(0.5, "f4"), "TIFF", {}),
    "floats to 255": (deep(100, "f4"), "TIFF", {}),
    "palette with alpha": (CLEAR.convert("PA"), "TIFF", {}),
    "grey with alpha": (CLEAR.convert("LA"), "PNG", {}),
    "transparent": (CLEAR, "PNG", {}),
    "transparent level": (Image.new("L", (4, 4), 30), "PNG", {"transparency": 30}),
    "transparent index": (Image.new("P", (4, 4)), "GIF", {"transparency": 0}),
    "one bit": (Image.new("1", (4, 4), 1), "PNG", {}),
    "CMYK": (Image.new("CMYK", (4, 4), (10, 200, 30, 40)), "TIFF", {}),
    "CMYK, JPEG": (Image.new("CMYK", (4, 4), (10, 200, 30, 40)), "JPEG", {"quality": 100}),
    "other profile": (Image.new("RGB", (4, 4), (10, 200, 30)), "PNG", {"icc_profile": SRGB.replace(b"sRGB", b"mine")}),
    "profile of other colours": (Image.new("CMYK", (4, 4), (10, 200, 30, 40)), "JPEG", {"icc_profile": LAB}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_pillow_is_shown_as_its_file(kind: str) -> None:
    picture, form, saved = KINDS[kind]
    file = io.BytesIO()
    picture.save(file, form, **saved)
    expected = prepare([file.getvalue()], OPTIONS)
    np.testing.assert_array_equal(prepare([Image.open(file)], OPTIONS), expected)
    if not saved:
        np.testing.assert_array_equal(prepare([picture], OPTIONS), expected)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_alpha_that_is_multiplied_already_is_on_white(mode: str) -> None:
    clear = (CLEAR.convert("LA") if mode == "La" else CLEAR).convert(mode)
    assert (prepare([clear], OPTIONS) == 255).all()


def test_a_closed_picture_is_named() -> None:
    file = io.BytesIO()
    CLEAR.save(file, "PNG")
    closed = Image.open(file)
    closed.close()
    with pytest.raises(ValueError, match=r"^picture 0: cannot be decoded"):
        prepare([closed], OPTIONS)
