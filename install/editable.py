"""Builds for `pip install -e .` (PEP 660): the checkout comes first on the path, before any other `common`.

A copy in site-packages is refused: names as common as `common` and `engine` would be everybody's there.
"""

import base64
import hashlib
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INFO = "segmae-0.dist-info"


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """PEP 517's hook, for an install that would copy."""
    raise SystemExit("SegMAE is installed from its checkout, which stays where it is: pip install -e .")


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """PEP 660's hook: a wheel of a line that puts the checkout on the path, and the command `segmae`."""
    packages = tomllib.loads((ROOT / "Pipfile").read_text())["packages"]
    needs = "".join(f"Requires-Dist: {name}{'' if of == '*' else of}\n" for name, of in packages.items())
    files = {
        "segmae.pth": f"import sys; sys.path.insert(0, {str(ROOT)!r})\n",
        f"{INFO}/METADATA": f"Metadata-Version: 2.1\nName: segmae\nVersion: 0\n{needs}",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: segmae\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{INFO}/entry_points.txt": "[console_scripts]\nsegmae = benchmark:command_line\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text.encode())}\n"
    files[f"{INFO}/RECORD"] = f"{record}{INFO}/RECORD,,\n"
    wheel = "segmae-0-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel
