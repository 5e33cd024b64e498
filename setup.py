"""RICE in JAX: livestreaming product recognition, from a folder of clips to a searchable shelf."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "rice_jax" / "version.py").read_text().split('"')[-2]

# Lower bounds are versions whose API the code needs; no newer one is known to break it, so there are no upper bounds.
CORE = [
    "jax>=0.10",  # jax.shard_map, lax.pcast, AxisType
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",  # CheckpointManager with args.Composite
    "grain>=0.2.18",
    "numpy>=2.0",
    "ml_collections>=1.1",
    "absl-py>=2.1",
    "pillow>=11.3",  # reads AVIF
    "simplejpeg>=1.8",  # 1.5 times Pillow's speed, the same pixels, and it tells of lost ones
    "google-crc32c>=1.6",
    "protobuf>=5.28.3",  # the codec of tf.train.Example; the version that grain needs, for Python 3.11 to 3.13
    "tqdm>=4.66",
    "tensorboardX>=2.6.2",  # writes event files without TensorFlow
    "jaxtyping>=0.3",
    "safetensors>=0.5",
    "flatbuffers>=24",  # jax.export's serialize() imports it, and jax does not list it
]
PARQUET = ["pyarrow>=17"]
EXTRAS = {
    "cuda": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "parquet": PARQUET,
    "preflight": ["libtpu>=0.0.50"],  # the TPU compiler, 0.5 GB; needs no TPU. Older ones crash on v5p
    "torch": ["torch>=2.4"],  # to write .pth files; they are read without it. 6 GB from the index, hence not in `test`
    "test": [
        *PARQUET,
        "pytest>=8",
        "pytest-xdist>=3.6",  # the tests on several cores
        "hypothesis>=6.100",
        "beartype>=0.20",
        "nbclient>=0.10",  # runs the notebook
        "ipykernel>=6",
        "tensorboard>=2.18",  # reads back the event files that tensorboardX wrote
        "ruff>=0.9",
        "mypy>=1.14",
    ],
}

setup(
    name="rice_jax",
    version=VERSION,
    description=__doc__,
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rice_jax*", "configs*", "data_pipeline*"]),
    package_data={"rice_jax": ["py.typed"]},
    entry_points={"console_scripts": ["rice-jax = rice_jax.__main__:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
