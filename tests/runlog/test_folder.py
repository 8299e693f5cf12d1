"""Whose folder it is: two live runs keep apart, and what is not ours is neither moved nor written between."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from llm_dynamics.runlog import RunLogWriter, load_run
from llm_dynamics.runlog.folder import LOCK_FILE, checked_folder, log_patterns

from .logs import META, new_log, observe, probes_frame


def claimed(folder):
    """A writer that has begun a run log, as training does; `train` stands for the method of a trainer."""
    writer = RunLogWriter(folder)
    writer.claim()
    writer.start(probes_frame(), META)
    return writer


class Trainer:
    """What keeps a lock alive: an object whose `train` is on the stack."""

    def train(self, folder, then=lambda: None):
        self.writer = claimed(folder)
        observe(self.writer, 0)
        return then()


# ---- two live runs ---------------------------------------------------------------------------------------------------


def test_a_second_run_in_one_process_gets_a_folder_of_its_own_while_the_first_goes_on(tmp_path):
    first, second, third = Trainer(), Trainer(), Trainer()
    folder = tmp_path / "dynamics"

    def nested():
        second.train(folder, lambda: third.train(folder))
        observe(first.writer, 1)

    first.train(folder, nested)
    assert [one.writer.folder.name for one in (first, second, third)] == ["dynamics", "dynamics-2", "dynamics-3"]
    assert load_run(folder).observed_steps == [0, 1]
    assert load_run(tmp_path / "dynamics-2").observed_steps == [0]


def test_a_run_that_an_exception_ended_holds_nothing_though_its_trainer_is_kept(tmp_path):
    interrupted, again = Trainer(), Trainer()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.train(tmp_path / "dynamics", interrupt)
    again.train(tmp_path / "dynamics")
    assert again.writer.folder == tmp_path / "dynamics"
    assert (tmp_path / "dynamics_before_001" / "meta.json").exists()


def test_a_run_that_ended_lets_the_next_have_the_folder_and_leaves_no_lock(tmp_path):
    first = claimed(tmp_path / "dynamics")
    first.close()
    assert not (tmp_path / "dynamics" / LOCK_FILE).exists()
    assert claimed(tmp_path / "dynamics").folder == tmp_path / "dynamics"
    assert not (tmp_path / "dynamics_before_001" / LOCK_FILE).exists()


def test_one_writer_begins_again_in_its_own_folder(tmp_path):
    writer = claimed(tmp_path / "dynamics")
    assert writer.claim() is None
    writer.start(probes_frame(), META)
    assert writer.folder == tmp_path / "dynamics"
    assert RunLogWriter(tmp_path / "dynamics").claim() == tmp_path / "dynamics"  # and still holds it


HOLD = """
import sys, time
from llm_dynamics.runlog import RunLogWriter
from tests.runlog.test_folder import claimed
from tests.runlog.logs import observe
writer = claimed(sys.argv[1])
observe(writer, 0)
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_holds_its_folder_until_it_is_killed_and_its_run_can_then_be_resumed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "dynamics")], stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        other = claimed(tmp_path / "dynamics")
        assert other.folder == tmp_path / "dynamics-2"
        holder.send_signal(signal.SIGKILL)
    resumed = RunLogWriter(tmp_path / "dynamics")
    assert resumed.claim() is None
    resumed.resume(0, META)
    observe(resumed, 1)
    assert load_run(tmp_path / "dynamics").observed_steps == [0, 1]


def test_a_forked_worker_does_not_keep_the_folder_of_a_run_that_ended(tmp_path):
    writer = claimed(tmp_path / "dynamics")
    begun, begins = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(begins, b"1")
        time.sleep(60)
        os._exit(1)
    try:
        assert os.read(begun, 1) == b"1"
        writer._lock._close()  # as when the run's process is killed; `close` would remove the file too
        assert RunLogWriter(tmp_path / "dynamics").claim() is None
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(begun)
        os.close(begins)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_where_the_file_system_has_no_locks_a_run_goes_on_without(tmp_path, monkeypatch, code):
    def flock(file, how):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    writer = claimed(tmp_path / "dynamics")
    observe(writer, 0)
    assert load_run(writer.folder).observed_steps == [0]


def test_a_folder_that_others_filled_since_it_was_chosen_is_left_alone(tmp_path):
    folder = checked_folder(tmp_path / "dynamics")
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years of work")
    writer = claimed(folder)
    assert writer.folder == tmp_path / "dynamics-2"
    assert [entry.name for entry in folder.iterdir()] == ["thesis.txt"]


# ---- whose folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["thesis.txt", "checkpoint-2/model.safetensors", "tokens/secrets.txt", ".git/HEAD", "model.safetensors"]
)
def test_a_folder_with_other_things_is_refused_and_they_are_named(tmp_path, entry):
    file = tmp_path / "mine" / entry
    file.parent.mkdir(parents=True)
    file.write_text("x")
    with pytest.raises(ValueError, match=rf"other things \({entry.split('/')[0]}.*such as log_folder="):
        checked_folder(tmp_path / "mine")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "sub/.."])
def test_no_name_the_working_directory_and_those_above_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="log_folder"):
        checked_folder(name)


def test_a_file_and_a_mount_point_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        checked_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="is a mount point"):
        checked_folder("/proc")


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_stays(tmp_path, exists):
    disk = tmp_path / "disk" / "log"
    disk.parent.mkdir()
    if exists:
        new_log(disk).close()
    (tmp_path / "dynamics").symlink_to(disk)
    writer = claimed(checked_folder(tmp_path / "dynamics"))
    observe(writer, 0)
    assert load_run(tmp_path / "dynamics").observed_steps == [0]
    assert (tmp_path / "dynamics").is_symlink()
    assert (tmp_path / "disk" / "log_before_001").exists() == exists


def test_what_a_killed_start_left_is_ours_and_a_broken_meta_too(tmp_path):
    (tmp_path / "a" / "tokens").mkdir(parents=True)
    assert checked_folder(tmp_path / "a") == tmp_path / "a"
    (new_log(tmp_path / "b").folder / "meta.json").write_text("{")
    assert checked_folder(tmp_path / "b") == tmp_path / "b"


def test_a_log_beside_checkpoints_is_moved_aside_without_them(tmp_path):
    out = tmp_path / "out"
    observe(claimed(out), 0)
    (out / "checkpoint-1").mkdir()
    (out / "tokens" / "mine.txt").write_text("x")
    writer = claimed(checked_folder(out))
    assert (out / "checkpoint-1").is_dir()
    assert load_run(tmp_path / "out_before_001").observed_steps == [0]
    assert load_run(writer.folder).observed_steps == []


# ---- what a push leaves out ------------------------------------------------------------------------------------------


def test_the_patterns_of_a_log_reach_it_and_its_like_only_below_the_folder_that_is_pushed(tmp_path):
    assert log_patterns(tmp_path / "dynamics", tmp_path)[0] == "dynamics/*"
    assert log_patterns(tmp_path / "logs" / "a", tmp_path)[0] == "logs/a/*"
    assert log_patterns(tmp_path.parent / "elsewhere", tmp_path) == []
    assert {"meta.json", "probes.parquet", "sequences/*"} <= set(log_patterns(tmp_path, tmp_path))
