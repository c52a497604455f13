"""The README's example for notebooks works as it stands there."""

import re
import shutil

import numpy as np
from PIL import Image

from tests.segmenter.boxes import REPOSITORY


def test_the_readmes_example_predicts_what_the_command_does(
    dataset, finished, tmp_path, monkeypatch, command
):
    readme = (REPOSITORY / "segmenter/README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    photo = dataset.parent / "images/validation/100.jpg"
    shutil.copytree(finished, tmp_path / "out")
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    labels = names["labels"]
    assert names["picture"].shape == (*Image.open(photo).size[::-1], 3)
    assert list(names["shares"]) == ["ground", "box", "sky"]
    assert sum(names["shares"].values()) == 1
    arguments = ("predict", "out/best.pth", "photo.jpg", "--out", "pictures", "--device", "cpu")
    assert command(*arguments).code == 0
    assert np.array_equal(labels, np.array(Image.open("pictures/photo.png")))
