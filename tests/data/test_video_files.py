"""Video files as FFmpeg writes them: turned upright, of every length, written and read back."""

import struct

import pytest
import torch

from rope_mm.data.video_files import read_video_file, write_video_file

pytest.importorskip("av", reason="needs the extra video")
TURNED = {  # degrees clockwise -> the first two columns of the matrix that a player applies
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


def take_all(total):
    return list(range(total))


def moving_square(frames=7, height=32, width=48):
    """Frames (t, 3, y, x) in [-1, 1] of a red square that moves right below a black bar."""
    video = torch.full((frames, 3, height, width), 0.9)
    video[:, :, :8] = -1
    for t in range(frames):
        video[t, :, 12:20, 4 * t : 4 * t + 8] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    return video


def pixels(images):
    return torch.stack(
        [
            torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(i.height, i.width, 3)
            for i in images
        ]
    ).permute(0, 3, 1, 2)


def turn(path, degrees):
    """Give a file the matrix by which phones say how a video is to be turned."""
    content = bytearray(path.read_bytes())
    a, b, c, d = (65_536 * number for number in TURNED[degrees])
    place = content.index(b"tkhd") + 44  # of the matrix, in the header of the track
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def test_a_video_that_is_written_is_read_back(tmp_path):
    video = moving_square()
    write_video_file(tmp_path / "a.mp4", video)
    found = pixels(read_video_file({"bytes": None, "path": tmp_path / "a.mp4"}, take_all)) / 127.5 - 1
    assert found.shape == video.shape
    assert (found - video).abs().mean() < 0.05  # colours are stored at half of the size
    chosen = read_video_file({"bytes": (tmp_path / "a.mp4").read_bytes(), "path": None}, lambda t: [t - 1, 0])
    assert torch.equal(pixels(chosen) / 127.5 - 1, found[[-1, 0]])


@pytest.mark.parametrize("degrees", TURNED)
def test_a_video_of_a_phone_is_read_upright(degrees, tmp_path):
    write_video_file(tmp_path / "a.mp4", moving_square())
    straight = pixels(read_video_file({"bytes": None, "path": tmp_path / "a.mp4"}, take_all))
    turn(tmp_path / "a.mp4", degrees)
    found = pixels(read_video_file({"bytes": None, "path": tmp_path / "a.mp4"}, take_all))
    assert torch.equal(found, straight.rot90(-degrees // 90, (2, 3)))


def test_what_is_no_video_is_refused_with_its_path(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(OSError, match=r"a\.mp4"):
        read_video_file({"bytes": None, "path": str(tmp_path / "a.mp4")}, take_all)


def test_odd_sides_are_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ValueError, match="even sides, not 5 x 8; write a GIF or WebP"):
        write_video_file(tmp_path / "a.mp4", torch.zeros(2, 1, 5, 8))
    assert not list(tmp_path.iterdir())
