"""The report of a conversion: counts of each split, for report.json and as a table for the screen."""

import collections
from typing import Any

import numpy as np

from data_pipeline.conversion.finish import Converted
from data_pipeline.faults import counted
from data_pipeline.layouts.pictures import ODDITIES

COUNTS = {  # key of the report: label in the table
    "listed_clips": "clips in the lists",
    "clips": "clips stored",
    "frames": "frames stored",
    "images": "shop images stored",
    "pairs": "pairs",
    "products": "products",
    "categories": "categories",
    "livestreams": "livestreams",
    "galleries": "galleries",
    "gallery_images": "shop images in galleries",
    "queries_without_frames": "truth entries without a stored clip",
    "skipped_clips": "clips left out",
    "skipped_images": "shop images left out",
    "failed_downloads": "frames whose download failed",
    "lost_boxes": "frames whose boxes are left out",
    "bytes": "bytes",
}


def count_split(split: Converted) -> dict[str, Any]:
    """Returns the COUNTS of a split, "skipped": its faults by reason, and "odd_pictures": their numbers by ODDITIES."""
    listing = split.listing
    clips, images = split.clip_ordinals, split.image_ordinals
    notes = (*split.images, *split.clips)
    odd: collections.Counter[str] = collections.Counter()
    for note in notes:
        odd.update(note.odd_pictures)
    products = np.concatenate([listing.columns["product"][clips], listing.image_products[images]])

    def distinct(values: Any) -> int:
        return len(np.unique(values[values >= 0]))

    return {
        "listed_clips": listing.listed,
        "clips": len(clips),
        "frames": split.num_frames,
        "images": len(images),
        "pairs": len(clips),  # each stored clip with its shop image
        "products": distinct(products),
        "categories": distinct(listing.columns["category"][clips]),
        "livestreams": distinct(listing.columns["livestream"][clips]),
        "galleries": len(split.galleries),
        "gallery_images": sum(map(len, split.galleries.values())),
        "queries_without_frames": max(0, len(listing.truth) - len(clips)) if listing.truth else 0,
        "skipped_clips": split.skipped_clips,
        "skipped_images": split.skipped_images,
        "failed_downloads": sum(note.failed_downloads for note in split.clips),
        "lost_boxes": split.lost_boxes,
        "bytes": sum(note.size for note in notes),
        "skipped": split.reasons,
        "odd_pictures": {name: odd[name] for name in ODDITIES if odd[name]},
    }


def lost_boxes(split: Converted) -> str:
    """Returns a remark on the frames of a split whose boxes are left out, "" if there are none."""
    if not split.lost_boxes:
        return ""
    return (
        f"{split.listing.split}: left out the boxes of {counted(split.lost_boxes, 'frame')}, since the picture of each "
        "has not the shape of its original (img2dataset's --resize_mode border and center_crop change it), or the size "
        "of that is not known; to have the boxes, download with --resize_mode keep_ratio."
    )


def print_report(report: dict[str, Any]) -> None:
    """Prints the report as a table with a column a split, then counts of faults and oddities, remarks, content hash."""
    splits = report["splits"]
    width = max(map(len, COUNTS.values())) + 2
    print(report["layout"].ljust(width) + "".join(f"{name:>16}" for name in splits))
    for key, label in COUNTS.items():
        print(label.ljust(width) + "".join(f"{split[key]:>16,}" for split in splits.values()))
    for name, split in splits.items():
        for reason, count in split["skipped"].items():
            print(f"{name}: left out for {reason}: {count:,}")
        for oddity, count in split["odd_pictures"].items():
            print(f"{name}: {count:,} pictures {ODDITIES[oddity]}")
    for remark in report["remarks"]:
        print(remark)
    print(f"content hash {report['content_hash']}")
