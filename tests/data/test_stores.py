"""Images by name: what is found, and that nothing outside is."""

import os

import pytest
from PIL import Image

from neva_jax.data.rows import BadRow
from neva_jax.data.stores import find_frames, find_image

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """`images` with one file, between files that do not belong to it."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images2").mkdir()
    for name in ("images/sub/a.png", "images2/a.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "images"


def test_names_inside_the_folder_are_found(folder):
    inside = folder / "sub" / "a.png"
    (folder / "link.png").symlink_to("sub/a.png")
    (folder.parent / "elsewhere").symlink_to(folder)
    for name in ("sub/a.png", "./sub//a.png", "sub/../sub/a.png", "../images/sub/a.png", "link.png", str(inside)):
        assert find_image(folder, name) == inside
        assert find_image(str(folder), name) == inside
    assert find_image(folder.parent / "elsewhere", "sub/a.png") == inside


def test_names_that_lead_out_are_refused(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "up").symlink_to("..")
    outside = str(folder.parent / "outside.png")
    for name in ("../outside.png", "sub/../../outside.png", "../images2/a.png", outside, "link.png", "up/outside.png"):
        with pytest.raises(BadRow) as error:
            find_image(folder, name)
        assert str(error.value) == f"field image: {name} leads out of {folder}"


def test_names_of_nothing_are_refused(folder):
    (folder / "dangling.png").symlink_to("absent.png")
    (folder / "loop.png").symlink_to("loop.png")
    names = ["absent.png", "sub/absent.png", "../absent.png", "/absent.png", "dangling.png", "loop.png", "a\0b.png"]
    for name in [*names, "sub/a.png/b.png", "x" * 300, "x/" * 3000]:
        with pytest.raises(BadRow) as error:
            find_image(folder, name)
        assert str(error.value) == f"field image: {name} is not in {folder}"


def test_names_of_something_else_are_refused(folder):
    os.mkfifo(folder / "pipe.png")
    for name in ("sub", ".", "", "pipe.png"):
        with pytest.raises(BadRow) as error:
            find_image(folder, name)
        assert str(error.value) == f"field image: {name} in {folder} is no regular file"


def test_without_a_folder_no_image_is_found():
    with pytest.raises(BadRow) as error:
        find_image(None, "a.png")
    assert str(error.value) == "field image names a.png, but its source has no images folder"


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def video(folder):
    """`clip` with frames 00.png … 06.png, made in another order, and a hidden file."""
    (folder / "clip").mkdir()
    for i in (3, 0, 6, 1, 5, 2, 4):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / "clip" / f"{i:02d}.png")
    (folder / "clip" / ".thumbs").write_text("x")
    return folder


def test_frames_are_the_files_of_the_folder_sorted_by_name(video):
    assert (
        find_frames(video, "clip")
        == find_frames(str(video), "./clip/")
        == [video / "clip" / f"{i:02d}.png" for i in range(7)]
    )


def test_videos_that_cannot_be_used(video):
    (video / "empty").mkdir()
    (video / "nested" / "sub").mkdir(parents=True)
    (video / "out").mkdir()
    (video / "out" / "a.png").symlink_to(video.parent / "outside.png")
    for name, message in {
        "absent": f"field video: absent is not in {video}",
        "..": f"field video: .. leads out of {video}",
        "../images2": f"field video: ../images2 leads out of {video}",
        "sub/a.png": f"field video: sub/a.png in {video} is neither a folder of frames nor a video file",
        "empty": f"field video: empty in {video} holds no frames",
        "nested": f"field video: nested/sub in {video} is no regular file",
        "out": f"field video: out/a.png leads out of {video}",
    }.items():
        with pytest.raises(BadRow) as error:
            find_frames(video, name)
        assert str(error.value) == message
    with pytest.raises(BadRow) as error:
        find_frames(None, "clip")
    assert str(error.value) == "field video names clip, but its source has no images folder"
