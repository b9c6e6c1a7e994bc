"""README.md is true: its commands run (trainings shortened), its code runs where it says."""

import re
import shutil
import subprocess
import sys

import pytest

SHORT = ("--encoder efficientnet_lite0 --decoder-channels 8 8 8 8 8 --epochs 1 --steps 1 --batch 2 "
         "--crop 64 --val-images 1 --class-weights none --workers 0").split()


def blocks(root, language):
    """The code blocks of a language; "" are those that show output."""
    text = (root / "README.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [body for name, body in fenced if name == language]


def commands(root, script):
    """The options of every README command that runs this script."""
    found = []
    for block in blocks(root, "bash"):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if script in words:
                found.append(words[words.index(script) + 1:])
    return found


def run(command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory):
    """A copy of what git tracks at the top level and in weights/."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*root.glob("*.py"), *root.glob("example*.png"), root / "requirements.txt"]:
        shutil.copy(path, folder)
    shutil.copytree(root / "weights", folder / "weights")
    return folder


def test_first_command_finds_the_nuclei_of_the_example(root, clone):
    command = blocks(root, "bash")[0]
    install, rest = command.split("pip install -r requirements.txt && ")  # .ci/run installs
    assert install.startswith("python3 -m venv")
    printed = run([sys.executable, *rest.split()[1:]], clone)
    names = {path.name for path in (clone / "predictions").iterdir()}
    assert {"example_overlay.png", "example_nuclei.geojson", "example_nuclei.csv",
            "example_instances.tif", "summary.csv"} <= names

    # README shows what it prints; counts differ a little from processor to processor
    shown = blocks(root, "")[0]
    without_numbers = [re.sub(r"[\d.,]+|bf16|fp32", "#", text) for text in (printed, shown)]
    assert without_numbers[0] == without_numbers[1]
    counts = [int(re.search(r"(\d+) nuclei", text)[1]) for text in (printed, shown)]
    assert abs(counts[0] - counts[1]) <= 3


def test_second_command_is_what_ci_runs(root):
    assert "python -m pytest -q" in blocks(root, "bash")[1]
    assert "-m pytest -q" in (root / ".ci" / "run").read_text()
    assert (root / "requirements.txt").read_text().split() == [
        "torch==2.13.0", "numpy", "scipy", "pillow", "pytest"]


def test_python_examples_run(root, clone):
    predict, copied = blocks(root, "python")
    assert "(512, 512)" in run([sys.executable, "-c", predict], clone)
    alone = clone / "alone"
    alone.mkdir()
    for name in ("dualunet.py", "postprocess.py", "example.png", "example_labels.png"):
        shutil.copy(root / name, alone)
    found, _, true, _ = run([sys.executable, "-c", copied], alone).split()
    assert abs(int(found) - int(true)) <= 2


def test_training_commands_are_understood_and_the_default_runs(root, clone):
    from recipes import parse_options

    assert len(commands(root, "train.py")) >= 6
    for words in commands(root, "train.py"):
        parse_options(words)
    run([sys.executable, "train.py", *SHORT, "--out", "run"], clone)
    assert (clone / "run" / "best.pt").exists()


def test_the_other_commands_are_understood(root):
    import evaluate
    import infer

    for words in commands(root, "evaluate.py"):
        evaluate.parse_options(words)
    assert len(commands(root, "infer.py")) >= 5
    for words in commands(root, "infer.py"):
        infer.parse_arguments(words)
    for script in ("data.py", "convert.py"):
        assert commands(root, script), script


def test_files_that_readme_names_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (root / name).exists(), name
    listed = set(re.findall(r"`(\w+\.py)`", text))
    assert {path.name for path in root.glob("*.py")} <= listed
