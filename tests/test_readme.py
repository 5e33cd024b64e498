"""Every command and every line of Python that README.md shows, run as it stands on data and models of a tiny size."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import clip_files, lpr_layouts, official, torch_files
from tests.test_folder import make_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in README.splitlines() if line.startswith("python -m")]
# Appended to a training command: the sizes of the tiny weights, two updates.
TINY = [
    "--config.batch_size=8",
    "--config.num_updates=2",
    "--config.eval_every=0",
    "--config.optimizer.warmup_updates=1",
]
SIZES = {
    "folder": "--config.data.image_size=16 --config.data.resize=16 --config.model.stem_channels=8,8,8 "
    "--config.model.width=16 --config.model.layers=1 --config.model.hidden=32 --config.model.embedding=16",
    "lpr750k": "--config.data.image_size=24 --config.data.resize=24 --config.model.patch_size=8 "
    "--config.model.width=128 --config.model.layers=3 --config.model.heads=2 --config.model.hidden=512 "
    "--config.model.embedding=48",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what README takes for given."""
    make_folder(tmp_path / "my_shop", ("Cola", "Tea", "Milk", "Soap"), clips=4)
    clips = [lpr_layouts.TinyClip(k % 2, 1000 * (k + 20), 1 + k % 4, k % 3) for k in range(8)]
    monkeypatch.setattr(lpr_layouts, "TRAIN", clips)
    lpr_layouts.make_lpr750k(tmp_path / "DIR")
    clip_files.write_openai(tmp_path / "ViT-B-32.pt", clip_files.vision_tower())
    arrays = official.read(ROOT / "tests" / "golden" / "rice_w64.npz")
    tensors = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
    torch_files.write_state_dict(tmp_path / "rice_final.pth", tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_and_the_python_of_the_readme_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) == 8
    for line in COMMANDS:
        _, _, module, *words = shlex.split(line)
        if module == "rice_jax.train":
            config = words[words.index("--config") + 1].split(":")[0]
            words += [*TINY, *SIZES[config].split()]
        monkeypatch.setattr("sys.argv", [module, *words])
        status = None
        monkeypatch.delitem(sys.modules, module, raising=False)  # as a fresh process would have it
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code
        assert not status, line
    assert (home / "rice-vit" / "model.safetensors").is_file() and (
        home / "runs" / "official" / "config.json"
    ).is_file()

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    given = {
        "frames": np.zeros((2, 3, 24, 24, 3), np.uint8),
        "mask": np.ones((2, 3), np.int32),
        "images": np.zeros((5, 24, 24, 3), np.uint8),
    }
    exec(code, given)
    assert given["clips"].shape == (2, 48) and given["shop_images"].shape == (5, 48) and given["scores"].shape == (2, 5)


def test_every_target_and_every_link_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
