"""What `pip install align-ti` puts on a machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_contains_everything_it_needs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    source = ROOT / "src"
    tracked = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked <= names
    for needed in (
        "align_ti/recipes/digits.yaml",
        "align_ti/report/page.html.j2",
        "align_ti/report/page.js",
        "align_ti/report/style.css",
        "align_ti/digits/assets/teacher/model.safetensors",
        "align_ti/digits/assets/student/chat_template.jinja",
    ):
        assert needed in names
    assert "align-ti = align_ti.cli:main" in entry
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
