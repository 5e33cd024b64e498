"""Other programs read our shards: TensorFlow, in an environment of its own, and Grain's own reader of TFRecords."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import grain
import pytest

from data_pipeline.format.reader import open_dataset
from data_pipeline.format.schema import decode_clip

DOCS = Path(__file__).parents[2] / "docs" / "data_formats.md"
READ = """
import json
found = []
for clip in clips.as_numpy_iterator():
    frames = [picture.hex() for picture in clip["frames/encoded"]]
    found.append([clip["clip/id"].decode(), frames, clip["frames/boxes"].tolist(), int(clip["image/index"])])
print(json.dumps(found))
"""


def test_grains_own_reader_reads_our_records(converted: Path) -> None:
    split = open_dataset(converted).split("train")
    paths = sorted(converted.glob("train-clips-*.tfrecord"))
    records = [record for path in paths for record in grain.experimental.TFRecordIterDataset(str(path))]
    assert len(records) == split.num_clips
    for row, record in enumerate(records):
        assert decode_clip(record) == split.clip(row)


@pytest.mark.slow
def test_tensorflow_reads_our_records_as_the_documentation_says(converted: Path, tmp_path: Path) -> None:
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "tf.data" in s)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "tensorflow-cpu"], check=True)
    script = snippet.replace("records/", f"{converted}/") + READ
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    split = open_dataset(converted).split("train")
    clips = [split.clip(row) for row in range(split.num_clips)]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [
            clip.id,
            [frame.encoded.hex() for frame in clip.frames],
            [side for frame in clip.frames for box in frame.boxes for side in box],
            clip.image_index,
        ]
        for clip in clips
    ]
