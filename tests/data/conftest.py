"""Video files of given pixels, without loss."""

import io

import pytest


@pytest.fixture
def video_file():
    """A function: frames (t, ch, y, x), uint8, ch 1 or 3 -> the bytes of a file of these pixels."""
    av = pytest.importorskip("av", reason="needs the extra video")

    def write(frames):
        channels, height, width = frames.shape[1:]
        kind, stored = {1: ("gray", "gray"), 3: ("rgb24", "bgr0")}[channels]
        content = io.BytesIO()
        with av.open(content, "w", format="matroska") as file:
            stream = file.add_stream("ffv1", rate=4)
            stream.width, stream.height, stream.pix_fmt = width, height, stored
            for frame in frames.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy():
                file.mux(
                    stream.encode(av.VideoFrame.from_ndarray(frame, format=kind).reformat(format=stored))
                )
            file.mux(stream.encode())
        return content.getvalue()

    return write
