from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration.trace import Link, Recorder, Trace
from onnxq.errors import CalibrationError
from tests.pair import DECODER, ENCODER, STEPS, generate, make_folder, open_pair, record, sentences


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pair")


def test_inputs_are_linked_to_what_put_them_out(folder: Path, tmp_path: Path) -> None:
    trace = record(folder, tmp_path / "trace", 2)
    assert trace.graphs == (ENCODER, DECODER)
    assert trace.sequences == 2
    assert [call.graph for call in trace.calls] == 2 * [ENCODER, *STEPS * [DECODER]]
    assert trace.calls[0].links == {}
    # The first state is zeros, nobody's output.
    assert trace.calls[1].links == {"memory": Link(0, "memory")}
    assert trace.calls[2].links == {"memory": Link(0, "memory"), "state": Link(1, "new_state")}
    second = trace.calls[STEPS + 2]
    assert second.links == {"memory": Link(STEPS + 1, "memory")}
    assert [call.sequence for call in trace.calls] == [0] * (STEPS + 1) + [1] * (STEPS + 1)


def test_a_wrapped_session_answers_as_its_own(folder: Path, tmp_path: Path) -> None:
    encoder, decoder = open_pair(folder)
    (ids,) = sentences(1)
    with Recorder(tmp_path / "trace") as recorder:
        recorder.next_sequence()
        wrapped = recorder.wrap(encoder, ENCODER), recorder.wrap(decoder, DECODER)
        assert generate(ids, *wrapped) == generate(ids, encoder, decoder)
        zeros = np.zeros((1, 64), np.float32)
        feed = {"token": np.zeros(1, np.int64), "memory": zeros, "state": zeros}
        (only,) = wrapped[1].run(["new_state"], feed)
        np.testing.assert_array_equal(only, decoder.run(["new_state"], feed)[0])
    assert [output.name for output in wrapped[1].get_outputs()] == ["logits", "new_state"]


def test_feeds_are_what_the_graph_saw(folder: Path, tmp_path: Path) -> None:
    trace = record(folder, tmp_path / "trace", 3)
    np.testing.assert_array_equal([feed["ids"] for feed in trace.feeds(ENCODER)][2], sentences(3)[2][None])
    feeds = list(trace.feeds(DECODER))
    assert len(feeds) == 3 * STEPS
    encoder, _ = open_pair(folder)
    (memory,) = encoder.run(None, {"ids": sentences(3)[1][None]})
    np.testing.assert_array_equal(feeds[STEPS]["memory"], memory)


def test_playing_follows_the_links(folder: Path, tmp_path: Path) -> None:
    """A change of the encoder's output reaches the decoder, and one of a state the next step."""
    trace = record(folder, tmp_path / "trace", 1)
    seen: list[dict[str, np.ndarray]] = []

    def encode(_: object) -> dict[str, np.ndarray]:
        return {"memory": np.full((1, 64), 7, np.float32)}

    def step(feed: object) -> dict[str, np.ndarray]:
        seen.append({name: np.array(array) for name, array in dict(feed).items()})  # type: ignore[call-overload]
        return {"logits": np.zeros((1, 96), np.float32), "new_state": np.full((1, 64), len(seen), np.float32)}

    played = list(trace.play({ENCODER: encode, DECODER: step}))
    assert len(played) == STEPS + 1
    assert all((feed["memory"] == 7).all() for feed in seen)
    assert [float(feed["state"][0, 0]) for feed in seen] == [0.0, 1.0, 2.0, 3.0, 4.0]
    np.testing.assert_array_equal([feed["token"] for feed in seen], [feed["token"] for feed in trace.feeds(DECODER)])


def test_the_head_and_how_often_graphs_run(folder: Path, tmp_path: Path) -> None:
    trace = record(folder, tmp_path / "trace", 3)
    assert len(trace.head(2).calls) == 2 * (STEPS + 1)
    assert trace.head(2).sequences == 2
    assert trace.calls_per_step(DECODER) == 1
    assert trace.calls_per_step(ENCODER) == pytest.approx(1 / STEPS)
    assert trace.calls_per_step("other.onnx") == 0


def test_an_interrupted_recording_is_no_trace(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace"

    def interrupted() -> None:
        with Recorder(out) as recorder:
            generate(sentences(1)[0], *(recorder.wrap(session, "x") for session in open_pair(folder)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not Trace.is_in(out)
    with pytest.raises(CalibrationError, match="holds no recorded trace"):
        Trace(out)
    with pytest.raises(CalibrationError, match="is not empty"):
        Recorder(out)
