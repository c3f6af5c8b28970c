"""The end of a run's outputs: each is closed, also after another one failed."""

import pytest
from micro import config

from k2jax.runs.folder import RunFolder
from k2jax.runs.records import RecordFile
from k2jax.train.display import Display
from k2jax.train.metrics import TensorBoard
from k2jax.train.outputs import Outputs


def test_a_file_that_cannot_be_closed_leaves_nothing_open(tmp_path, monkeypatch):
    """A disk that fills up at the last flush: TensorBoard and the display end all the same, and the error is seen."""
    closed = []

    def fail(self):
        self._file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordFile, "close", fail)
    monkeypatch.setattr(TensorBoard, "close", lambda self: closed.append(self._writer.close()))
    monkeypatch.setattr(Display, "close", lambda self: closed.append("display"))
    outputs = Outputs(RunFolder(tmp_path), config(), 0)
    outputs.open_records()
    with pytest.raises(OSError, match="No space left"):
        outputs.close()
    assert closed == [None, "display"]
