"""Draws a livestream shop: python -m data_pipeline.synthetic --output DIR

It has products in 34 categories, with siblings that differ in their pattern alone, shop images, clips and lists, in the
layout of LPR750K. The same seed and sizes give the same files, with any number of workers. If it is killed, the same
command goes on where it stopped. Exit status: 0 done (or done before), 1 failed, 2 wrong use.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.format.tfrecord import write_file
from data_pipeline.input.sampling import sample_frames
from data_pipeline.owner import remove_abandoned, temporary_name
from data_pipeline.synthetic_shop.catalogue import Clip, Product, Shop, plan_shop
from data_pipeline.synthetic_shop.categories import CATEGORIES
from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.products import draw_product, shop_image
from data_pipeline.synthetic_shop.rooms import Room, draw_room
from data_pipeline.synthetic_shop.scenes import Scene, backdrop, draw_overlay
from data_pipeline.synthetic_shop.shots import HEIGHT, WIDTH, Box, Sprite, plan_shots
from data_pipeline.system.command_line import add_workers, exit_status, make_parser
from data_pipeline.system.lease import Lease
from data_pipeline.system.output_folder import WORK, claim
from data_pipeline.system.paths import parse_path
from data_pipeline.system.workers import Workers

PRODUCTS, CLIPS_A_PRODUCT = 102, 8
SHELF = 9  # products that fit on the shelf behind the host
SAMPLED = 10  # frames of a query (docs/official.md 8.8)
NO_BOX = (0, 0, 0, 0)  # docs/official.md 8.5
VERSION = 1  # of the drawing: to be raised when the same seed gives other files
DONE, ANNOTATIONS = "synthetic.json", "annotations"
SCALES = (("small", 0.1), ("medium", 0.25), ("large", 1.0))  # largest mean share of the frame that the boxes cover
DURATIONS = (("short", 4), ("medium", 7), ("long", math.inf))  # most seconds that the product is shown
Boxes = list[Box | None]  # of a clip's frames; None: the product is not shown


def synthesize(*, output: Path, products: int, clips: int, seed: int, workers: int) -> Shop:
    """Draws the shop into `output`, unless it is there already, and returns its plan.

    Raises WrongUseError if the seed is not 0 to 2**64 - 1, there are too few or too many products, or too few clips for
    them, or if `output` has other files or is in use; OSError if it cannot be written.
    """
    shop = plan_shop(products=products, clips=clips, seed=seed)
    identity = {"products": products, "clips": clips, "seed": seed, "version": VERSION}
    output.mkdir(parents=True, exist_ok=True)
    with Lease(output) as lease:
        if claim(output, identity, output / DONE):
            print(f"{output}: already drawn, nothing to do.")
        else:
            boxes = _draw(Studio(shop, output), workers, lease)
            lease.check()
            for folder in output.glob("[!.]*/"):
                remove_abandoned(folder)  # clips that a killed run was drawing
            write_lists(shop, output, boxes)
            summary = summarize(shop)
            write_file(output / DONE, (json.dumps({"identity": identity, **summary}, indent=2) + "\n").encode())
            for name, value in summary.items():
                print(f"{name.replace('_', ' '):<18}{value:>12,}")
            shutil.rmtree(output / WORK, ignore_errors=True)
    return shop


def _draw(studio: "Studio", workers: int, lease: Lease) -> dict[int, Boxes]:
    shop = studio.shop
    (studio.output / WORK / "sprites").mkdir(exist_ok=True)
    seconds = [sum(clip.length for clip in clips) for clips in shop.clips_by_livestream]
    boxes: dict[int, Boxes] = {}
    with Workers(workers, studio) as pool:
        products = [(product.index,) for product in shop.products]
        for _ in pool.run(Studio.draw_product, products, "products", total=len(products), unit="product"):
            pass
        livestreams = [(live.index,) for live in shop.livestreams]
        for drawn in pool.run(
            Studio.draw_livestream, livestreams, "clips", total=sum(seconds), unit="frame",
            weigh=lambda task: seconds[task[0]],
        ):  # fmt: skip
            lease.check()
            boxes |= drawn
    return boxes


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, as a key of caches
class Studio:
    """Draws the products and clips of a planned shop; it is shared by the workers."""

    shop: Shop
    output: Path

    def draw_product(self, index: int) -> None:
        """Draws the product's sprite and, in every folder that shows it, its shop image, unless the sprite exists."""
        kept = self.sprite_path(index)
        if kept.exists():
            return
        product, seed = self.shop.products[index], self.shop.seed
        shape, light = Dice(seed, "shape", product.group), Dice(seed, "light", product.group)  # siblings share them
        picture = draw_product(product.category, product.palette, product.pattern, shape, Dice(seed, "pattern", index))
        data = _encode(shop_image(picture, product.palette, light), "JPEG", quality=90)
        for path in image_paths(self.shop, product):
            (self.output / path).parent.mkdir(parents=True, exist_ok=True)
            (self.output / path).write_bytes(data)
        write_file(kept, _encode(picture, "PNG", compress_level=1))  # last: then the shop images are complete

    def draw_livestream(self, index: int) -> dict[int, Boxes]:
        """Draws a livestream's clips; returns each frame's box or None by clip index. FileNotFoundError: no sprite."""
        return {clip.index: self._draw_clip(clip) for clip in self.shop.clips_by_livestream[index]}

    def _draw_clip(self, clip: Clip) -> Boxes:
        """Draws the clip's folder, unless it is there; it appears only when it is complete. Returns a box a frame."""
        scene = self.scene(clip)
        folder = self.output / clip.folder
        if not folder.exists():
            unfinished = temporary_name(folder)
            unfinished.mkdir(parents=True)
            try:
                for second, frame_id in enumerate(clip.frame_ids):
                    data = _encode(scene.frame(second), "JPEG", quality=85)
                    (unfinished / f"{frame_id}.jpg").write_bytes(data)
                unfinished.replace(folder)
            except BaseException as err:
                shutil.rmtree(unfinished)
                # A worker that outlived a killed run for a moment may have drawn the same clip.
                if not (isinstance(err, OSError) and folder.exists()):
                    raise
        return [scene.box(second) for second in range(clip.length)]

    def scene(self, clip: Clip) -> Scene:
        """Returns the scene of a clip. Raises FileNotFoundError if a sprite of its products is not drawn yet."""
        seed, dice = self.shop.seed, Dice(self.shop.seed, "scene", clip.index)
        product, *others = (_sprite(self, index) for index in (clip.product, *clip.others))
        room, palm, fingers, overlay = _stage(self, clip.livestream)
        lights = Dice(seed, "lights", clip.livestream)
        shots = plan_shots(lights, dice, product, clip.length, range(*clip.shown), passing=bool(others))
        behind = backdrop(room, dice, others, shots[sum(clip.shown) // 2])
        return Scene(behind, palm, fingers, product, others[-1] if others else None, overlay, shots)

    def sprite_path(self, index: int) -> Path:
        return self.output / WORK / "sprites" / f"{index:06d}.png"


@functools.lru_cache(maxsize=256)  # half a megabyte each
def _sprite(studio: Studio, index: int) -> Sprite:
    with Image.open(studio.sprite_path(index)) as picture:
        return Sprite(picture.copy())


@functools.lru_cache(maxsize=2)
def _stage(studio: Studio, livestream: int) -> tuple[Room, Sprite, Sprite, Image.Image]:
    dice = Dice(studio.shop.seed, "room", livestream)
    shelf = studio.shop.livestreams[livestream].shelf
    room = draw_room(dice, [_sprite(studio, index).picture for index in shelf[:SHELF]])
    return room, Sprite(room.palm), Sprite(room.fingers), draw_overlay(dice)


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# --- lists ------------------------------------------------------------------------------------------------------------


def image_paths(shop: Shop, product: Product) -> list[str]:
    """Returns the relative paths of a product's shop image: for training if seen there, then in its galleries."""
    training = [f"training_image/{product.image_id}.jpg"] if product.seen else []
    return [*training, *(f"gallery/{live.id}/{product.image_id}-0.jpg" for live in shop.galleries_of[product.index])]


def write_lists(shop: Shop, output: Path, boxes: dict[int, Boxes]) -> None:
    """Writes the folder of annotations, which appears only when it is complete, in place of an older one."""
    products = shop.products
    test = shop.clips_of("test")
    truth = {clip.id: [products[clip.product].image_id] for clip in test}
    queries = {
        clip.id: {
            "frames": [f"{clip.id}/{clip.frame_ids[k]}.jpg" for k in sample_frames(clip.length, SAMPLED).tolist()],
            "gt": truth[clip.id],
        }
        for clip in test
    }
    galleries = {live.id: [products[index].image_id for index in live.shelf] for live in shop.galleries}
    of_frame = {
        frame: [box or NO_BOX] for clip in test for frame, box in zip(clip.frame_ids, boxes[clip.index], strict=True)
    }
    shown = sorted({index for live in shop.galleries for index in live.shelf})
    training = {
        split: [_training_row(clip, products[clip.product], boxes[clip.index]) for clip in shop.clips_of(split)]
        for split in ("train", "val")
    }
    files: dict[str, Any] = {
        f"training_videoinfo_{len(training['train'])}.txt": training["train"],
        "training_videoinfo_val.txt": training["val"],
        "query_tenframes.json": queries,
        "gallery_main.txt": [f"{live}/{image}-0.jpg" for live, shelf in galleries.items() for image in shelf],
        f"test_videoid_to_gtimage_{len(test)}.json": truth,
        f"test_liveid_to_gallery_{len(galleries)}.json": galleries,
        f"test_frameid2gtbox_{len(test)}_{len(of_frame)}.json": of_frame,
        f"test_videoid_asr_{len(test)}.txt": [f"{clip.id}\t{clip.speech}" for clip in test],
        f"test_image_title_{len(shown)}.txt": [f"{products[i].image_id}\t{products[i].title}" for i in shown],
        "test_videoid_seen.txt": [clip.id for clip in test if products[clip.product].seen],
        "test_videoid_unseen.txt": [clip.id for clip in test if not products[clip.product].seen],
    }
    folder = output / WORK / ANNOTATIONS
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else "".join(f"{line}\n" for line in content)
        write_file(folder / name, text.encode())
    shutil.rmtree(output / ANNOTATIONS, ignore_errors=True)  # of a run that was killed before its last file
    folder.replace(output / ANNOTATIONS)


def _training_row(clip: Clip, product: Product, boxes: Boxes) -> str:
    """Returns a line of thirteen columns, by tabs: ten of docs/official.md 8.3, and the last three of 8.4."""
    frames = [f"{clip.folder}/{frame}.jpg" for frame in clip.frame_ids]
    category = str(list(CATEGORIES).index(product.category))
    cells = [
        clip.id, str(frames), str([list(box or NO_BOX) for box in boxes]), product.image_id,
        f"training_image/{product.image_id}.jpg", product.title, category, product.category, f"spu{product.index:05d}",
        clip.speech, scale_of(boxes), duration_of(clip), "multiple" if clip.others else "single",
    ]  # fmt: skip
    return "\t".join(cells)


def scale_of(boxes: Boxes) -> str:
    """Returns "small", "medium" or "large", by the mean share of the frame that the boxes cover; one box at least."""
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes if box]
    share = sum(areas) / len(areas) / (WIDTH * HEIGHT)
    return next(name for name, most in SCALES if share <= most)


def duration_of(clip: Clip) -> str:
    """Returns "short", "medium" or "long", by the seconds that the clip shows its product."""
    seconds = clip.shown[1] - clip.shown[0]
    return next(name for name, most in DURATIONS if seconds <= most)


def summarize(shop: Shop) -> dict[str, Any]:
    """Returns the shop's counts, ints by name, and as "chance" the Recall@1 of a random guess, in per cent."""
    test = shop.clips_of("test")
    shelf = [len(shop.livestreams[clip.livestream].shelf) for clip in test]
    return {
        "categories": len({product.category for product in shop.products}),
        "products": len(shop.products),
        "products_unseen": sum(not product.seen for product in shop.products),
        "livestreams": len(shop.livestreams),
        **{f"clips_{split}": len(shop.clips_of(split)) for split in ("train", "val", "test")},
        "frames": sum(clip.length for clip in shop.clips),
        "galleries": len(shop.galleries),
        "gallery_images": sum(len(live.shelf) for live in shop.galleries),
        "chance": round(100 * sum(1 / images for images in shelf) / len(shelf), 2),
    }


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = make_parser(prog, __doc__)
    parser.add_argument("--output", required=True, type=parse_path, metavar="DIR", help="made if missing")
    parser.add_argument("--products", type=int, default=PRODUCTS, metavar="N", help=f"with siblings ({PRODUCTS})")
    parser.add_argument("--clips", type=int, metavar="N", help=f"of all splits ({CLIPS_A_PRODUCT} a product)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another shop (0)")
    add_workers(parser)
    parsed = parser.parse_args(arguments)
    if parsed.clips is None:
        parsed.clips = CLIPS_A_PRODUCT * parsed.products
    return parsed


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_pipeline.synthetic") -> int:
    options = parse(arguments, prog)
    return exit_status(lambda: synthesize(**vars(options)), output=options.output, kept="finished pictures are kept")


if __name__ == "__main__":
    sys.exit(main())
