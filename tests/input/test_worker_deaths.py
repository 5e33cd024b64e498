"""Workers of the input that something kills: the error names the signal, what is needed and what to set."""

import os
import signal

import pytest

from data_pipeline.input.batches import train_batches
from data_pipeline.input.plan import Plan
from data_pipeline.system.processes import WorkerDiedError, death_of_worker
from rice_jax import errors
from tests.input.test_batches import NUM_CLIPS, OPTIONS, Record, TinySplit


class Killed(TinySplit):
    """A split whose eighth clip ends the process that reads it, as a full /dev/shm does."""

    def clip(self, row: int) -> Record:
        if row == 8:
            os.kill(os.getpid(), signal.SIGBUS)
        return super().clip(row)


def test_the_signal_of_a_worker_is_named_by_the_run_that_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: object) -> None:
        with train_batches(Killed(), Plan(NUM_CLIPS, 23, 0), range(23), OPTIONS, workers=1) as batches:
            next(batches)

    with pytest.raises(SystemExit) as ended:
        errors.run(main, None)
    text = capsys.readouterr().err
    assert ended.value.code == 1 and text.startswith("error: a worker process of the input was killed by SIGBUS")
    assert "/dev/shm has" in text and "workers need about" in text and "--shm-size" in text and "data.workers=0" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-signal.SIGBUS, r"killed by SIGBUS: shared memory .* need about 3,500 MB .* --shm-size=4g"),
        (-signal.SIGKILL, "killed by SIGKILL: most often the system .* lower data.workers"),
        (-signal.SIGSEGV, "killed by SIGSEGV: a library crashed; .* PYTHONFAULTHANDLER=1"),
        (-signal.SIGABRT, "killed by SIGABRT: a library crashed"),
        (-signal.SIGTERM, "killed by SIGTERM: something ended it"),
        (-63, "killed by (SIG|signal )"),
        (7, "terminated unexpectedly with exit code 7"),
    ],
)
def test_every_end_of_a_worker_has_an_advice(code: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        raise WorkerDiedError(death_of_worker(code, 3_500_000_000))
