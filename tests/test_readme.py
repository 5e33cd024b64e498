"""README.md's commands and Python run on tiny data and models, and the documents name only files that exist."""

import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from rice_jax.preflight import topologies
from tests import clip_files, lpr_layouts, official, torch_files
from tests.layouts.test_own_folder import make_folder
from tests.test_doctor import make_own_frames

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in README.splitlines() if line.startswith("python -m")]
UPDATES = 2
# Appended to each training command: a small batch and two updates.
TINY = [
    "--config.batch_size=8",
    f"--config.num_updates={UPDATES}",
    "--config.eval_every=0",
    "--config.optimizer.warmup_updates=1",
]
SIZES = {
    "folder": "--config.data.image_size=16 --config.data.resize=16 --config.model.stem_channels=8,8,8,8 "
    "--config.model.width=24 --config.model.layers=1 --config.model.hidden=32 --config.model.embedding=16",
    "lpr750k": "--config.data.image_size=24 --config.data.resize=24 --config.model.patch_size=8 "
    "--config.model.width=128 --config.model.layers=3 --config.model.heads=2 --config.model.hidden=512 "
    "--config.model.embedding=48",
}
SIZES["one_gpu"] = SIZES["lpr750k"]
SIZES["pod"] = f"{SIZES['lpr750k']} --config.mesh.data=1 --config.mesh.fsdp=1 --config.data.num_frames=2"
# Words of the commands that need a TPU compiler or a long run, and their replacements.
HERE = {"v5e:16x16": "cpu:1", "1200": str(UPDATES)}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "rice_jax|data_pipeline|configs|tests|docs|benchmarks|launch|colab"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|md|npz|csv|json|txt|ipynb|yaml))?")
COMMAND = re.compile(r"python -m ((?:rice_jax|data_pipeline|configs|tests|benchmarks)(?:\.\w+)*)")
NAME = re.compile(r"`((?:rice_jax|data_pipeline|benchmarks)(?:\.\w+)+)")
OFFICIAL = ("configs/datasets/",)  # paths of the official code in docs/official.md


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with the data and weights that README's commands need."""
    make_folder(tmp_path / "my_shop", ("Cola", "Tea", "Milk", "Soap"), clips=4)
    clips = [lpr_layouts.TinyClip(k % 2, 1000 * (k + 20), 1 + k % 4, k % 3) for k in range(8)]
    monkeypatch.setattr(lpr_layouts, "TRAIN", clips)
    lpr_layouts.make_lpr750k(tmp_path / "DIR")
    for picture in sorted([*tmp_path.glob("DIR/training_video_*/*/*.jpg"), *tmp_path.glob("DIR/query/*/*.jpg")]):
        make_own_frames(picture)
    clip_files.write_openai(tmp_path / "ViT-B-32.pt", clip_files.vision_tower())
    arrays = official.read(ROOT / "tests" / "golden" / "rice_w64.npz")
    tensors = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
    torch_files.write_state_dict(tmp_path / "rice_final.pth", tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_and_the_python_of_the_readme_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) == 11 and topologies.parse("v5e:16x16").size == 256
    # beartype identifies a class by its name, and each run of a command has its own class __main__.Run.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for line in COMMANDS:
        _, _, module, *words = shlex.split(line)
        words = [HERE.get(word, word) for word in words]
        if "--config" in words:
            config = words[words.index("--config") + 1].split(":")[0]
            words += [*TINY, *SIZES[config].split()]
        monkeypatch.setattr("sys.argv", [module, *words])
        status = None
        monkeypatch.delitem(sys.modules, module, raising=False)  # as in a fresh process
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code
        assert not status, line
    left = ("rice-vit/model.safetensors", "runs/official/config.json", "build/doctor/report.html")
    assert all((home / path).is_file() for path in (*left, f"runs/rice/update-{UPDATES}.png"))

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    given = {
        "frames": np.zeros((2, 3, 24, 24, 3), np.uint8),
        "mask": np.ones((2, 3), np.int32),
        "files": sorted((home / "my_shop" / "shop").iterdir()),
    }
    exec(code, given)
    assert given["clips"].shape == (2, 48) and given["shop_images"].shape == (4, 48) and given["scores"].shape == (2, 4)


def test_every_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_module_and_link_of_a_document_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in PATH.findall(text):
        assert path.startswith(OFFICIAL) or (ROOT / path).exists(), path
    for module in COMMAND.findall(text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for name in NAME.findall(text):
        pkgutil.resolve_name(name)  # raises where there is no such module or attribute
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        assert link.startswith("http") or (document.parent / link).exists(), link


def test_a_path_or_module_that_does_not_exist_is_found() -> None:
    assert PATH.findall("see `rice_jax/losses.py`, tests/<room>/ or https://x.y/docs/z.md.") == [
        "rice_jax/losses.py",
        "tests/",
    ]
    assert COMMAND.findall("    python -m rice_jax.exports --help") == ["rice_jax.exports"]
    assert NAME.findall("`rice_jax.load(RUN)` and `rice_jax.weights.exports`") == [
        "rice_jax.load",
        "rice_jax.weights.exports",
    ]
