"""runs.py: the journal, the time left, progress in a log, and processes that share work."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import runs

SETTINGS = {"tile": None, "formats": ["csv"]}


def noted(folder, name="a"):
    """A journal in which an image is done, and the image's path."""
    image = folder / f"{name}.png"
    image.write_text("pixels")
    journal = runs.Journal(folder / "out", SETTINGS, False)
    (folder / "out" / f"{name}.csv").write_text("")
    journal.add(image, name, outputs=[f"{name}.csv"], row={"nuclei": 3}, counts=[3], mpp_source="")
    return journal, image


def test_the_journal_knows_settings_input_and_outputs(tmp_path):
    journal, image = noted(tmp_path)
    entry = journal.done()["a"]
    assert entry["row"] == {"nuclei": 3} and entry["settings"] == SETTINGS
    assert journal.covers(image, entry) and not journal.covers(image, None)
    (tmp_path / "out" / "a.csv").rename(tmp_path / "gone")
    assert not journal.covers(image, entry)
    (tmp_path / "gone").rename(tmp_path / "out" / "a.csv")
    image.write_text("other pixels")
    with pytest.raises(ValueError, match="a.csv is of .*a.png, or of an earlier state of this"):
        journal.covers(image, entry)
    with pytest.raises(ValueError, match="holds outputs of another tile; choose another --out"):
        runs.Journal(tmp_path / "out", SETTINGS | {"tile": 64}, False)
    other = runs.Journal(tmp_path / "out", SETTINGS | {"tile": 64}, True)
    assert other.done() == {} and not other.covers(image, entry)


def test_a_line_that_was_cut_or_changed_counts_for_nothing(tmp_path):
    journal, _ = noted(tmp_path)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-30])  # killed while it wrote
    assert journal.done() == {}
    noted(tmp_path, "b")
    assert list(journal.done()) == ["b"]
    for damaged in (whole.replace(b'"nuclei": 3', b'"nuclei": 4'), b"\xff\x00\n[]\n5\n{}\n",
                    whole.replace(b'"check"', b'"chick"')):
        journal.path.write_bytes(damaged)
        assert journal.entries() == []


def test_many_writers_lose_no_line(tmp_path):
    journal, image = noted(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for k in range(100):
            pool.submit(journal.add, image, str(k), outputs=[], row={"text": "x" * 3000})
    assert len(journal.done()) == 101


def test_a_log_gets_a_line_now_and_then_with_the_time_left(tmp_path, capsys, monkeypatch):
    for name, size in (("a", 300), ("b", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    estimate = runs.Estimate([tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: estimate.start + 30)
    progress = estimate.begin(tmp_path / "a", 0)
    for done in range(1, 5):
        progress(done, 4)
    assert capsys.readouterr().err == f"{tmp_path / 'a'} (1 of 2): 3 of 4 tiles, 23 s left\n"
    assert [runs.time_left(60, part) for part in (0.5, 0.1, 0.002)] == [
        "60 s left", "9 min left", "8.3 h left"]


def test_a_terminal_gets_one_line_that_changes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    runs.show_progress("1 of 2")
    runs.say("warning", "a.png", "odd")
    assert capsys.readouterr().err == "\r\033[K1 of 2\r\033[Kwarning: a.png: odd\n"


def test_the_closing_lines_say_which_resolutions_were_used():
    config = {"class_names": ["x"], "mpp": 0.25, "licence": None}
    new = []
    for k in range(5):
        row = {"nuclei": 1000, "x": 1000, "megapixels": 1.5, "um_per_pixel": 0.3 + k / 10}
        new.append({"counts": [1000], "row": row, "mpp_source": "the slide"})
    new.append({"counts": [0], "row": row | {"um_per_pixel": None}, "mpp_source": "assumed"})
    lines = runs.closing_lines(new, [], {"bad"}, config, 2.0, "out")
    assert lines[:2] == ["1 image failed, see above", "5,000 nuclei in 6 images: x 5,000"]
    assert lines[2].startswith("9.00 megapixels at 0.3 µm per pixel (the slide; resampled to 0.2")
    assert lines[2].endswith(" and 2 others, see summary.csv in 2.0 s")
    assert lines[3:] == ["no resolution in the file or the checkpoint; --mpp gives areas in µm²",
                         "written to out, with a row an image in summary.csv"]
    lines = runs.closing_lines(new[:1], [], set(), config, 2.0, "out")
    assert lines[-1].endswith("; licence of the weights: not stated")


@pytest.mark.parametrize("counts, doubted", [
    ([0, 95, 5], True), ([0, 94, 6], False), ([99, 0, 0], False), ([1000], False), ([0, 0], False)])
def test_classes_are_doubted_where_nearly_all_nuclei_have_one(counts, doubted):
    names = ["a", "b", "c"][:len(counts)]
    row = dict(zip(names, counts)) | {"nuclei": sum(counts), "megapixels": 1, "um_per_pixel": 0.25}
    new = [{"counts": counts, "row": row, "mpp_source": "x"}]
    config = {"class_names": names, "mpp": 0.25, "licence": None}
    lines = "\n".join(runs.closing_lines(new, [], set(), config, 1.0, "out"))
    assert ("nearly all nuclei are called b: doubt the classes" in lines) == doubted
    assert "nearly all" not in lines or doubted
    if doubted:
        del row["a"]  # with --keep, no such doubt
        assert "nearly all" not in "\n".join(
            runs.closing_lines(new, [], set(), config, 1.0, "out"))


def test_the_first_process_answers_for_all(tmp_path):
    runs.leave_note(tmp_path, 1, {"b", "a"})
    runs.leave_note(tmp_path, 2, set())
    assert runs.wait_for_notes(tmp_path, 3) == {"a", "b"}
    assert list(tmp_path.iterdir()) == [] and runs.wait_for_notes(tmp_path, 1) == set()


def test_precision_follows_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for features, expected in (({"avx512_bf16": True}, torch.bfloat16), ({}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f, raising=False)
        assert runs.pick_precision(cpu) == expected
    assert runs.pick_precision(cpu, "fp32") is None
    assert runs.pick_precision(cpu, "bf16") == torch.bfloat16
    assert runs.start_pool(None, cpu) is None


def test_images_keep_their_order_and_are_done_once(tmp_path):
    for name in ("b.png", "a.svs", "c.txt"):
        (tmp_path / name).write_text(json.dumps(name))
    images, skipped = runs.find_images([tmp_path / "b.png", tmp_path], "out")
    assert list(images) == [tmp_path / "b.png", tmp_path / "a.svs"]
    assert list(images.values()) == ["b", "a"]
    assert skipped == [f"{tmp_path}: skipped 1 file that is no picture (.txt)"]
    with pytest.raises(ValueError, match="is --out too"):
        runs.find_images([tmp_path], tmp_path)
