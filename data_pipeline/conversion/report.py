"""What a conversion did, as numbers for report.json and as a table for the screen."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.conversion.finish import Converted

COUNTS = {  # key of the report: words of the table
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
    "bytes": "bytes",
}


def make_report(
    layout: str, converted: Sequence[Converted], remarks: Sequence[str], content_hash: str
) -> dict[str, Any]:
    return {
        "layout": layout,
        "content_hash": content_hash,
        "splits": {split.listing.split: _of_split(split) for split in converted},
        "remarks": list(remarks),
    }


def _of_split(split: Converted) -> dict[str, Any]:
    listing = split.listing
    clips = np.array([ordinal for note in split.clips for ordinal in note.ordinals], np.int64)
    images = np.array([ordinal for note in split.images for ordinal in note.ordinals], np.int64)
    products = np.concatenate([listing.columns["product"][clips], listing.image_products[images]])

    def distinct(values: Any) -> int:
        return len(np.unique(values[values >= 0]))

    return {
        "listed_clips": listing.listed,
        "clips": split.num_clips,
        "frames": sum(sum(note.frames) for note in split.clips),
        "images": split.num_images,
        "pairs": split.num_clips,  # each stored clip with its shop image
        "products": distinct(products),
        "categories": distinct(listing.columns["category"][clips]),
        "livestreams": distinct(listing.columns["livestream"][clips]),
        "galleries": len(split.galleries),
        "gallery_images": sum(map(len, split.galleries.values())),
        "queries_without_frames": max(0, len(listing.truth) - split.num_clips) if listing.truth else 0,
        "skipped_clips": split.skipped_clips,
        "skipped_images": split.skipped_images,
        "failed_downloads": sum(note.failed_downloads for note in split.clips),
        "bytes": sum(note.size for note in (*split.images, *split.clips)),
        "skipped": split.reasons,
    }


def print_report(report: dict[str, Any]) -> None:
    splits = report["splits"]
    width = max(map(len, COUNTS.values())) + 2
    print(f"{report['layout']}".ljust(width) + "".join(f"{name:>16}" for name in splits))
    for key, words in COUNTS.items():
        print(words.ljust(width) + "".join(f"{split[key]:>16,}" for split in splits.values()))
    for name, split in splits.items():
        for reason, count in split["skipped"].items():
            print(f"{name}: left out for {reason}: {count:,}")
    for remark in report["remarks"]:
        print(remark)
    print(f"content hash {report['content_hash']}")
