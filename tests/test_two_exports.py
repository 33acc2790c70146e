"""Two exports at the same time with the same --workdir: one goes on undisturbed, the other says who works there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.files import claimed
from tacq_export.pipeline import export


def start(model: Path, task: Path, outfile: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tacq_export", model, "--task", task, "--outfile", outfile, "--n-samples", 3]
    command += ["--seq-len", 32, "-t", 1, *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def alone(tiny_gguf, tiny_task, tmp_path_factory) -> dict[str, bytes]:
    """What each of the two writes when nobody else is there."""
    files = {}
    for bpw in ("2.45", "3.5"):
        outfile = tmp_path_factory.mktemp("alone") / "out.gguf"
        done = start(tiny_gguf, tiny_task, outfile, "--target-bpw", bpw)
        assert done.wait(300) == 0, done.stderr.read()
        files[bpw] = outfile.read_bytes()
    return files


def check_refused(said: str, folder: Path, other: subprocess.Popen, outfile: Path) -> None:
    sentence = (
        f"error: The work folder {folder}/work is in use by process {other.pid}, which writes {outfile}; wait until "
        "that has ended, or give another --workdir."
    )
    assert said.strip().splitlines() == [sentence]


def test_one_writes_its_file_and_the_other_says_who_works_there(tiny_gguf, tiny_task, tmp_path, alone):
    """The first is stopped as soon as it has the folder, so that the second surely meets it there."""
    first = start(tiny_gguf, tiny_task, tmp_path / "a.gguf", "--target-bpw", 3.5, "-w", tmp_path / "work")
    lock = tmp_path / ".work.lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = start(tiny_gguf, tiny_task, tmp_path / "b.gguf", "--target-bpw", 2.45, "-w", tmp_path / "work")
    said = second.communicate(timeout=300)[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    check_refused(said, tmp_path, first, tmp_path / "a.gguf")
    said = first.communicate(timeout=300)[1]
    assert first.returncode == 0, said
    assert (tmp_path / "a.gguf").read_bytes() == alone["3.5"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "work"}, "the lock is left behind"


@pytest.mark.parametrize("apart", [0.0, 0.3, 1.0])
def test_two_that_start_at_any_time_write_the_right_file_or_none(tiny_gguf, tiny_task, tmp_path, alone, apart):
    """Where one has ended before the other reaches the folder, both write."""
    first = start(tiny_gguf, tiny_task, tmp_path / "a.gguf", "--target-bpw", 3.5, "-w", tmp_path / "work")
    time.sleep(apart)
    second = start(tiny_gguf, tiny_task, tmp_path / "b.gguf", "--target-bpw", 2.45, "-w", tmp_path / "work")
    said = [process.communicate(timeout=300)[1] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert sorted(codes) in ([0, 0], [0, 1]), said
    for code, name, bpw in zip(codes, ("a.gguf", "b.gguf"), ("3.5", "2.45"), strict=True):
        if code == 0:
            assert (tmp_path / name).read_bytes() == alone[bpw]
        else:
            assert not (tmp_path / name).exists()
    if 1 in codes:
        bad = codes.index(1)
        check_refused(said[bad], tmp_path, (second, first)[bad], tmp_path / ("b.gguf", "a.gguf")[bad])
    assert not (tmp_path / ".work.lock").exists(), "the lock is left behind"


def test_both_go_on_in_turn_and_calibrate_once(tiny_gguf, tiny_task, tmp_path, alone):
    """The lock ends with the export that has it."""
    for name, bpw in (("a.gguf", 3.5), ("b.gguf", 2.45)):
        options = {"target_bpw": bpw, "n_samples": 3, "seq_len": 32, "threads": 1, "workdir": tmp_path / "work"}
        export(ExportConfig(str(tiny_gguf), tiny_task, tmp_path / name, **options))
        assert (tmp_path / name).read_bytes() == alone[str(bpw)]


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = "import sys, time; from pathlib import Path; from tacq_export.files import claimed\n"
    code += "with claimed(Path(sys.argv[1]), 'writes x.gguf'): print('in', flush=True); time.sleep(60)"
    folder = tmp_path / "deep" / "work"
    other = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    for name in (folder, tmp_path / "link" / "work", tmp_path / "deep" / ".." / "deep" / "work"):
        with pytest.raises(TacqError, match=rf"is in use by process {other.pid}, which writes x.gguf; wait"):
            with claimed(name, "writes y.gguf"):
                pytest.fail("two have it")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "deep" / ".work.lock").exists()
    with claimed(folder, "writes y.gguf"):
        pass
    assert not list((tmp_path / "deep").iterdir())


def test_of_many_at_once_never_two_have_it(tmp_path):
    """Threads that claim and give back as fast as they can: the file is removed and made anew under their hands."""
    inside, most, won, said = [], [], [], []

    def work() -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            try:
                with claimed(tmp_path / "work", "works"):
                    inside.append(1)
                    most.append(len(inside))
                    won.append(1)
                    inside.pop()
            except TacqError as error:
                said.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(most) == 1 and len(won) > 10 and said
    assert all(re.search(rf"is in use by (process {os.getpid()}, which works|another tacq-export); ", s) for s in said)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_sentence_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TacqError, match=r"The work folder .*/file/work cannot be made \(.*\); give another"):
        with claimed(tmp_path / "file" / "work", "works"):
            pytest.fail("made")
    with pytest.raises(KeyError):
        with claimed(tmp_path / "new" / "folders" / "work", "works"):
            assert (tmp_path / "new" / "folders").is_dir()
            raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
