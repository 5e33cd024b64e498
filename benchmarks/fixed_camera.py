"""Times the data doctor on frames of a camera that stands still: python -m benchmarks.fixed_camera

Every frame has the same background, but for a product that covers --share of it, at another place in each frame, and
the noise of its own JPEG quality. Products, clips and splits differ, so no two frames are the same picture. One of the
frames is planted in another split, encoded anew. The report has, for each number of frames, the seconds that the doctor
takes and the faults that it finds, which should be the planted one, and how the time grows from number to number.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import turns
from data_pipeline import doctor
from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import errors

CLIPS, FRAMES = 4, 10  # of a product, of a clip; by default the clips are two of training, one of val, one of test
SIDE = 256  # pixels of a frame
STEP = 10  # pixels between two places of a product
Picture = NDArray[np.uint8]


def _smooth(rng: np.random.Generator, side: int, cells: int) -> Picture:
    """Returns a picture of random colours that run into one another, [side, side, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _save(picture: Picture, path: Path, quality: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, "JPEG", quality=quality)


def draw_shop(source: Path, frames: int, share: float, seed: int = 0) -> None:
    """Writes a source of the layout "folder" with so many frames of one camera, a multiple of CLIPS x FRAMES.

    share: of a frame that a product covers. The first test frame is also a training frame of another product.
    """
    rng = np.random.default_rng(seed)
    background, side = _smooth(rng, SIDE, 9), round(SIDE * share**0.5)
    for product in range(frames // (CLIPS * FRAMES)):
        package = _smooth(rng, side, 4)
        shop = np.full((96, 96, 3), 255, np.uint8)
        shop[16:80, 16:80] = np.asarray(Image.fromarray(package).resize((64, 64)))
        _save(shop, source / "shop" / f"{product:05}.jpg", 90)
        steps = np.arange(0, SIDE - side, STEP)
        places = rng.permutation([(x, y) for x in steps for y in steps])  # no two frames of a product are alike
        for place, (clip, number) in enumerate(itertools.product(range(CLIPS), range(FRAMES))):
            frame = background.copy()
            x, y = places[place % len(places)]
            frame[y : y + side, x : x + side] = package
            path = source / "clips" / f"{product:05}" / str(clip) / f"{number}.jpg"
            _save(frame, path, int(rng.integers(60, 96)))
    planted = Image.open(source / f"clips/00000/{CLIPS - 1}/0.jpg")
    planted.save(source / "clips/00001/0/0.jpg", "JPEG", quality=50)


def inspect(source: Path, output: Path, workers: int) -> tuple[turns.Seconds, dict[str, Any]]:
    """Returns the seconds that the doctor takes, and its report."""
    start = turns.Seconds(time.perf_counter(), time.process_time())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        options = doctor.parse_options([str(source), f"--output={output}", f"--workers={workers}"], "doctor")
        doctor.check_options(options)
        report = doctor.inspect(options)
    end = turns.Seconds(time.perf_counter(), time.process_time())
    return turns.Seconds(end.wall - start.wall, end.processor - start.processor), report


def main(arguments: argparse.Namespace) -> None:
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, turns.Seconds] = {}
    faults = {}
    for frames in arguments.frames:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            draw_shop(Path(scratch) / "source", frames, arguments.share)
            taken = []
            for repeat in range(arguments.repeats):
                of_run, found = inspect(Path(scratch) / "source", Path(scratch) / str(repeat), arguments.workers)
                taken.append(of_run)
        seconds[str(frames)] = min(taken)
        faults[str(frames)] = {kind: each["count"] for kind, each in found["counts"].items()}
    pairs = itertools.pairwise(seconds.items())
    growth = {number: turns.ratio(after, before) for (_, before), (number, after) in pairs}
    report = {
        "workers": arguments.workers,
        "repeats": arguments.repeats,
        "share_of_a_frame": arguments.share,
        "seconds": seconds,
        "times_the_seconds_before": growth,
        "faults": faults,
    }
    turns.write_report(arguments.output, report)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fixed_camera", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--frames", type=parse_count, nargs="+", default=[600, 1200, 2400, 4800], help="multiples of 40"
    )
    parser.add_argument("--share", type=float, default=0.014, help="share of a frame that a product covers")
    parser.add_argument("--workers", type=parse_count, default=1, help="processes; the processor's time counts one (1)")
    parser.add_argument("--scratch", type=parse_path, default=Path("build/benchmarks"), help="folder for the frames")
    parser.add_argument("--repeats", type=parse_count, default=1, help="of which the fastest counts")
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/fixed_camera.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.run(main, parse())
