"""What stands between each fault and the harm it would do, line by line; and a program that takes it away and sees the fault's test fail.

    .venv/bin/python -m tests.faults.protections [FAULT ...]

For one fault after the other the protecting lines are changed in this checkout, the test is run, and the lines are put back. A test that
passes all the same proves nothing: the program says so and exits non-zero. Of most faults the test waits for what does not come, so all of
them take about half an hour. The numbers are those of the faults, in the names of the tests in tests/faults; of 18, the races that
the protection was written for are had by the thousand in tests/core/jobs.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROCESSES = "tests/faults/test_processes.py"
PATIENCE_SECONDS = 300
"""After which a test that still waits is taken to have noticed: it waits for what the protection brings about."""


@dataclass(frozen=True)
class Edit:
    """`old` occurs once in the file, `new` stands in its place."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Protection:
    fault: int
    what: str
    edits: tuple[Edit, ...]
    test: str


LEASE_DEADLINE = Edit("sdft_engine/train.py", "expired = control.lease_deadline is not None and machine_seconds() > control.lease_deadline", "expired = False")
POLL_FOR_WORK = Edit("worker/polling.py", "len(self._searches) < self._most_searches and work_is_waiting(self._resources)", "False")

PROTECTIONS = (
    Protection(
        1,
        "an attempt fetches the newest checkpoint",
        (Edit("worker/run_preparation.py", "session.execute(states.order_by(Checkpoint.step.desc())).all()", "[]"),),
        f"{PROCESSES}::test_1_a_killed_trainer_resumes_and_the_loss_goes_on_exactly[sqlite]",
    ),
    Protection(
        1,
        "a checkpoint holds the optimizer's moments",
        (Edit("sdft_engine/checkpoint.py", '        _restore_optimizer(model, optimizer, load_file(directory / "optimizer.safetensors"))\n', ""),),
        f"{PROCESSES}::test_1_a_killed_trainer_resumes_and_the_loss_goes_on_exactly[sqlite]",
    ),
    Protection(
        2,
        "a trainer dies with its worker",
        (
            Edit("sdft_engine/train.py", "        die_with_parent()\n", "        pass\n"),
            Edit("sdft_engine/train.py", "os.getppid() != (torchrun_pid or control.supervisor_pid)", "False"),
        ),
        f"{PROCESSES}::test_a_killed_worker_s_job_goes_on_elsewhere[sqlite-2_main_process]",
    ),
    Protection(
        3,
        "workers look for expired leases",
        (Edit("worker/polling.py", "        free_expired_leases(self._resources)\n", ""),),
        f"{PROCESSES}::test_a_killed_worker_s_job_goes_on_elsewhere[sqlite-3_main_process_and_trainer]",
    ),
    Protection(
        4,
        "a trainer stops at its lease's deadline",
        (LEASE_DEADLINE,),
        f"{PROCESSES}::test_4_a_frozen_worker_s_trainer_stops_itself_and_the_stale_attempt_writes_nothing",
    ),
    Protection(
        4,
        "the fence: a change needs the lease's token",
        (Edit("core/jobs/leases.py", ".where(Job.id == claim.job_id, Job.lease_token == claim.lease_token)", ".where(Job.id == claim.job_id)"),),
        "tests/core/jobs/test_transitions.py::test_stale_holder_writes_nothing",
    ),
    Protection(
        5,
        "supervisors are told that their worker ends",
        (Edit("worker/held_lease.py", '        if self._resources.stopping.is_set():\n            return "requeue"\n', ""),),
        f"{PROCESSES}::test_5_a_deploy_saves_a_checkpoint_and_charges_nothing[postgres]",
    ),
    Protection(
        6,
        "an upload that is cut off removes what it wrote",
        (Edit("api/files/upload.py", "await state.storage_threads.run(upload.abort, patient=True)", "pass"),),
        "tests/faults/test_api.py::test_6_an_upload_that_is_cut_off_leaves_nothing_and_can_be_repeated[sqlite]",
    ),
    Protection(
        7,
        "a retry finds what its first try has created",
        (
            Edit("api/fine_tuning/jobs/creation.py", "        refuse_repetition(session, creation)\n", ""),
            Edit("api/fine_tuning/jobs/creation.py", "        record_creation(session, creation, job.id, job_object(job, None))\n", ""),
        ),
        "tests/faults/test_api.py::test_a_job_whose_creation_killed_the_api_is_there_once_and_runs[7_before_the_response-postgres]",
    ),
    Protection(
        8,
        "workers look for jobs that no message told of",
        (POLL_FOR_WORK,),
        "tests/faults/test_api.py::test_a_job_whose_creation_killed_the_api_is_there_once_and_runs[8_before_the_nudge-postgres]",
    ),
    Protection(9, "the same", (POLL_FOR_WORK,), "tests/faults/test_broker.py::test_9_jobs_whose_nudges_were_flushed_run_once_each[sqlite]"),
    Protection(
        10,
        "a broker that hangs is spoken to in a thread of its own",
        (Edit("core/doorbell.py", 'threading.Thread(target=self._publish_pending, name="doorbell", daemon=True).start()', "self._publish_pending()"),),
        "tests/faults/test_broker.py::test_10_a_broker_that_hangs_holds_up_no_request_and_no_job[postgres]",
    ),
    Protection(
        10,
        "workers look for jobs while the broker is away",
        (POLL_FOR_WORK,),
        "tests/faults/test_broker.py::test_10_without_the_broker_jobs_are_created_and_start_soon_after_it_is_back[down-sqlite]",
    ),
    Protection(
        11,
        "a claim takes a job that nobody else is taking",
        (
            Edit(
                "core/jobs/leases.py",
                ".where(Job.id == first.scalar_subquery(), Job.status == status, Job.lease_token.is_(None))",
                ".where(Job.id == first.scalar_subquery())",
            ),
            Edit("core/jobs/leases.py", "candidates.limit(1).with_for_update(of=Job, skip_locked=True)", "candidates.limit(1)"),
            Edit("core/jobs/transitions.py", "    keep_claims_apart(session)\n", ""),
        ),
        "tests/faults/test_broker.py::test_11_fifty_claimers_on_a_thousand_jobs_claim_each_once[postgres]",
    ),
    Protection(
        12,
        "a supervisor goes on while the database is away",
        (Edit("worker/held_lease.py", "        except ServiceError as error:  # unreachable, busy or full\n", "        except ZeroDivisionError as error:\n"),),
        "tests/faults/test_database.py::test_12_a_restart_of_postgres_costs_a_job_nothing_or_an_attempt[shorter]",
    ),
    Protection(
        13,
        "an exhausted pool is a 503",
        (Edit("core/database.py", "    except PoolTimeout as error:\n", "    except ZeroDivisionError as error:\n"),),
        "tests/faults/test_api.py::test_13_an_exhausted_database_is_a_503_that_passes[no_connection_left]",
    ),
    Protection(
        14,
        "a full disk is told from other failures of a checkpoint",
        (
            Edit("sdft_engine/contract/sealed_directory.py", 'or "No space left" in str(error)', ""),
            Edit("sdft_engine/contract/sealed_directory.py", "error.errno in (errno.ENOSPC, errno.EDQUOT)", "False"),
            Edit("core/durable_files.py", "error.errno in (errno.ENOSPC, errno.EDQUOT)", "False"),
        ),
        "tests/faults/test_training.py::test_14_a_disk_that_is_full_at_a_checkpoint_fails_the_job_and_spares_what_was_stored[sqlite]",
    ),
    Protection(
        14,
        "an upload that fills the disk is removed and told of",
        (Edit("core/storage.py", "        if is_disk_full(error):\n", "        if False:\n"),),
        "tests/faults/test_training.py::test_14_a_disk_that_is_full_at_an_upload_is_told_and_spares_what_was_stored[postgres]",
    ),
    Protection(
        15,
        "a checkpoint's hash is compared when it is fetched",
        (Edit("core/storage.py", "        if digest.hexdigest() != sha256:\n", "        if False:\n"),),
        "tests/faults/test_training.py::test_15_a_damaged_checkpoint_is_passed_over[one_bit-postgres]",
    ),
    Protection(
        16,
        "a job waits for a bucket that fails",
        (
            Edit(
                "worker/storage_outages.py",
                "        except StorageUnavailable as error:\n            if began is None:",
                "        except ZeroDivisionError as error:\n            if began is None:",
            ),
        ),
        "tests/faults/test_machines.py::test_16_a_bucket_that_fails_delays_a_job_and_never_lets_it_succeed_unstored",
    ),
    Protection(
        17,
        "a loss that is no number ends the job",
        (
            Edit("sdft_engine/trainer.py", 'if not (math.isfinite(measured["train_loss"]) and math.isfinite(gradient_norm)):', "if False:"),
            Edit("sdft_engine/trainer.py", "if not math.isfinite(adapter_norm):", "if False:"),
        ),
        "tests/faults/test_training.py::test_17_numbers_that_are_none_fail_the_job_once_and_say_what_to_change[sqlite]",
    ),
    Protection(
        17,
        "too little memory is told from other failures",
        (Edit("sdft_engine/train.py", "if isinstance(error, MemoryError) or any(", "if False and any("),),
        "tests/faults/test_training.py::test_17_too_little_memory_fails_the_job_once_and_says_what_to_change[sqlite]",
    ),
    Protection(
        18,
        "a cancellation locks the job before it looks at it",
        (Edit("core/jobs/transitions.py", ".where(Job.id == job_id).with_for_update()).one_or_none()", ".where(Job.id == job_id)).one_or_none()"),),
        "tests/core/jobs/test_races.py::test_cancel_racing_completion_gives_one_ending[postgres]",
    ),
    Protection(
        19,
        "what is handed back pauses where that was asked meanwhile",
        (
            Edit(
                "core/jobs/transitions.py",
                '    elif requested == "pause":\n        finish_pause(session, claim)\n    return requested is not None\n',
                '    return requested == "cancel"\n',
            ),
        ),
        "tests/core/jobs/test_state_machine.py::test_no_order_of_events_breaks_a_job",
    ),
    Protection(
        20,
        "one load at a time of an adapter",
        (Edit("api/completions/adapter_loading.py", "        if task is None:\n", "        if True:\n"),),
        "tests/faults/test_api.py::test_20_a_killed_inference_server_is_told_of_and_its_adapters_come_back[postgres]",
    ),
    Protection(
        21,
        "a stream goes on after Last-Event-ID",
        (Edit("api/fine_tuning/jobs/event_stream.py", "JobEvent.sequence > position", "JobEvent.sequence >= position"),),
        "tests/faults/test_event_stream.py::test_21_no_event_is_missed_or_read_twice_however_often_the_connection_breaks[postgres]",
    ),
    Protection(
        22,
        "a worker claims nothing from a database of another version",
        (Edit("worker/presence.py", "        self._resources.schema_fits = fits\n", ""),),
        "tests/faults/test_database.py::test_22_a_migration_under_a_running_worker_ends_no_job_and_starts_none[postgres]",
    ),
)


def texts_without(protection: Protection) -> dict[Path, str]:
    """The changed files as they are to be. Raises ValueError where an edit no longer fits its file."""
    texts: dict[Path, str] = {}
    for edit in protection.edits:
        path = ROOT / edit.path
        text = texts.get(path) or path.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.path}: {edit.old!r} occurs {text.count(edit.old)} times")
        texts[path] = text.replace(edit.old, edit.new)
    return texts


@contextmanager
def without(protection: Protection) -> Iterator[None]:
    """Raises ValueError as `texts_without` does, and has changed nothing then."""
    texts = texts_without(protection)
    before = {path: path.read_text() for path in texts}
    try:
        for path, text in texts.items():
            path.write_text(text)
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


def verdict_of(test: str) -> tuple[bool, str]:
    """Whether the test fails, and how."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return True, f"still waiting after {PATIENCE_SECONDS} s"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it stops what it started
            process.communicate()
    if process.returncode not in (0, 1):
        raise RuntimeError(output[-3000:])
    how = next((line for line in output.splitlines() if line.startswith("E  ")), output[-200:])
    return process.returncode == 1, " ".join(how.removeprefix("E").split())[:150]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", type=int, metavar="FAULT", help="numbers; all by default")
    chosen = parser.parse_args(arguments).faults
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the lines are put back
    unnoticed = 0
    for protection in PROTECTIONS:
        if chosen and protection.fault not in chosen:
            continue
        began = time.monotonic()
        with without(protection):
            noticed, how = verdict_of(protection.test)
        unnoticed += not noticed
        verdict = f"{'noticed' if noticed else 'NOT NOTICED'} in {time.monotonic() - began:.0f} s"
        sys.stdout.write(f"{protection.fault:>2} {verdict}, without: {protection.what}\n      {how}\n")
        sys.stdout.flush()
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
