"""README.md is true: its commands run (trainings shortened), its code runs where it says."""

import re
import shutil
import subprocess
import sys

import pytest

SHORT = ("--epochs 1 --steps 1 --batch 2 --crop 64 --val synthetic_4 --class-weights none "
         "--workers 0 --out run").split()


def blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```",
                      (root / "README.md").read_text(encoding="utf-8"), re.S)


def run(command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory):
    """A copy of what git tracks at the top level and in weights/."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*root.glob("*.py"), root / "requirements.txt"]:
        shutil.copy(path, folder)
    shutil.copytree(root / "weights", folder / "weights")
    return folder


def test_first_command_finds_the_nuclei_of_an_image_that_it_makes(root, clone):
    command = blocks(root, "bash")[0]
    install, rest = command.split("pip install -r requirements.txt && ")  # .ci/run installs
    assert install.startswith("python3 -m venv")
    for step in rest.strip().split(" && "):
        out = run([sys.executable, *step.split()[1:]], clone)
    assert "nuclei (" in out and int(re.match(r"[\d,]+", out)[0].replace(",", "")) > 50
    names = {path.name for path in (clone / "predictions").iterdir()}
    assert {f"example{suffix}" for suffix in (
        "_overlay.png", "_nuclei.geojson", "_nuclei.csv", "_instances.tif")} <= names


def test_second_command_is_what_ci_runs(root):
    assert "python -m pytest -q" in blocks(root, "bash")[1]
    assert "-m pytest -q" in (root / ".ci" / "run").read_text()
    assert (root / "requirements.txt").read_text().split() == [
        "torch==2.13.0", "numpy", "scipy", "pillow", "pytest"]


def test_python_examples_run(root, clone):
    predict, copied = blocks(root, "python")
    run([sys.executable, "data.py", "example.png"], clone)
    assert run([sys.executable, "-c", predict], clone)
    alone = clone / "alone"
    alone.mkdir()
    for name in ("dualunet.py", "postprocess.py"):
        shutil.copy(root / name, alone)
    assert run([sys.executable, "-c", copied], alone)


def test_training_commands_are_understood_and_the_default_runs(root, clone):
    from train import parse_options

    commands = [line.split("#")[0].split() for block in blocks(root, "bash")
                for line in block.splitlines() if "train.py" in line and not line.startswith("#")]
    assert len(commands) >= 5
    for words in commands:
        parse_options(words[words.index("train.py") + 1:])
    run([sys.executable, "train.py", *SHORT], clone)
    assert (clone / "run" / "best.pt").exists()
