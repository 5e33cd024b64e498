"""Compares our ranking at LPR4M's size with the official loop: python -m benchmarks.ranking [--output FILE].

There are 20,079 queries in 110 galleries of 66,358 shop images. The official loop has one dot product and one stable
sort per query, in NumPy. Ours is `rank_queries`, from arrays to ranks and top 10, with its work on the host. Both are
timed in turn in one run, and the result is the ratio of medians.
"""

import os

# The official loop is fastest with one thread: more make products of this size slower, on a busy machine 20 times.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np

from data_pipeline.system.command_line import parse_count
from data_pipeline.system.paths import parse_path
from rice_jax import errors
from rice_jax.retrieval.ranking import rank_queries

QUERIES, GALLERIES, IMAGES, WIDTH = 20_079, 110, 66_358, 512


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray, list[list[int]]]:
    """Returns random embeddings, in which true pairs are closer than chance, and their galleries.

    Gallery sizes and numbers of queries per gallery are log-normal. The result is (query embeddings [Q, E], image
    embeddings [I, E], image rows of each gallery, gallery of each query [Q], true image rows of each query).
    """
    rng = np.random.default_rng(seed)
    sizes, counts = (
        rng.multinomial(total - GALLERIES, share / share.sum()) + 1
        for total, share in ((IMAGES, rng.lognormal(0, 0.5, GALLERIES)), (QUERIES, rng.lognormal(0, 0.5, GALLERIES)))
    )
    image_ie = rng.standard_normal((IMAGES, WIDTH), np.float32)
    image_ie /= np.linalg.norm(image_ie, axis=1, keepdims=True)
    galleries = [rows.astype(np.int32) for rows in np.split(np.arange(IMAGES), np.cumsum(sizes)[:-1])]
    gallery_of = rng.permutation(np.repeat(np.arange(GALLERIES), counts))
    true_row = np.array([rng.choice(galleries[g]) for g in gallery_of])
    query_qe = image_ie[true_row] + 0.3 * rng.standard_normal((QUERIES, WIDTH), np.float32)
    query_qe /= np.linalg.norm(query_qe, axis=1, keepdims=True)
    return query_qe, image_ie, galleries, gallery_of, [[int(row)] for row in true_row]


def official_loop(
    query_qe: np.ndarray,
    image_ie: np.ndarray,
    galleries: list[np.ndarray],
    gallery_of: np.ndarray,
    truth: list[list[int]],
) -> np.ndarray:
    """Returns int32 [Q], the rank of each query's true entry, by a stable sort of its whole gallery."""
    gallery_images = [image_ie[rows] for rows in galleries]
    rank_q = np.zeros(len(query_qe), np.int32)
    for query, gallery in enumerate(gallery_of):
        order = np.argsort(-(gallery_images[gallery] @ query_qe[query]), kind="stable")
        rank_q[query] = 1 + np.flatnonzero(galleries[gallery][order] == truth[query][0])[0]
    return rank_q


def main() -> None:
    """Prints the report and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=parse_path, default=Path("build/benchmarks/ranking.json"))
    parser.add_argument("--repeats", type=parse_count, default=3)
    arguments = parser.parse_args()
    query_qe, image_ie, galleries, gallery_of, truth = draw(seed=0)

    def ours() -> np.ndarray:
        ids = range(IMAGES)
        return rank_queries(
            query_qe, image_ie, galleries=galleries, gallery_of=gallery_of, image_ids=ids, truth=truth
        ).rank

    start = time.perf_counter()
    rank_q = ours()
    first_call = time.perf_counter() - start
    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        expected_q = official_loop(query_qe, image_ie, galleries, gallery_of, truth)
        seconds["official"].append(time.perf_counter() - start)
        start = time.perf_counter()
        rank_q = ours()
        seconds["ours"].append(time.perf_counter() - start)
    official, mine = (float(np.median(seconds[name])) for name in ("official", "ours"))
    report = {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "shapes": {"queries": [QUERIES, WIDTH], "images": [IMAGES, WIDTH], "galleries": GALLERIES},
        "dtype": "float32",
        "repeats": arguments.repeats,
        "official_seconds": official,
        "ours_seconds": mine,
        "first_call_seconds": first_call,
        "times_faster": official / mine,
        "ranks_that_differ": int(np.count_nonzero(rank_q != expected_q)),
        "recall@1_percent": 100 * float(np.mean(rank_q == 1)),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    errors.run(lambda _: main(), None)
