"""Images by name: what is found, and that nothing outside is."""

import io
import os
import pickle
import socket
import tarfile
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from neva_jax.data import archives, stores
from neva_jax.data.rows import BadRow
from neva_jax.data.stores import FolderStore, find_image, open_store
from neva_jax.errors import UserError

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
    for store, name in ((FolderStore(video), "clip"), (FolderStore(str(video)), "./clip/")):
        assert [store.read(frame, "video") for frame in store.frames(name)] == [
            (video / "clip" / f"{i:02d}.png").read_bytes() for i in range(7)
        ]


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
            store = FolderStore(video)
            store.read(store.frames(name)[0], "video")
        assert str(error.value) == message
    with pytest.raises(BadRow) as error:
        open_store(None, video).frames("clip")
    assert str(error.value) == "field video names clip, but its source has no images folder"


# --- stores ----------------------------------------------------------------------------------------------------------

FILES = {"a.png": b"first", "sub/b.jpg": b"second", "sub/deep/c.png": b"", "clip/01.png": b"1", "clip/00.png": b"0"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(content)


def make_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for info, content in members:
            tar.addfile(info, content)
    return path


def make_parquet(path, images, **options):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(images, kind)}), path, **options)
    return path


@pytest.fixture(params=["folder", "tar", "gnu tar", "parquet"])
def store(request, tmp_path, cache):
    """Each kind of store with `FILES`, but for files of no bytes in Parquet."""
    path = tmp_path / request.param
    if request.param == "folder":
        for name, content in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        (path / "clip/.hidden").write_bytes(b"x")
    elif request.param == "parquet":
        images = [{"path": name, "bytes": content} for name, content in FILES.items()] + [None]
        make_parquet(path, [*images, {"path": None, "bytes": b"nameless"}], row_group_size=2)
    else:
        members = [member("sub", type=tarfile.DIRTYPE), *(member(f"./{name}", FILES[name]) for name in FILES)]
        options = {"format": tarfile.GNU_FORMAT if "gnu" in request.param else tarfile.PAX_FORMAT}
        make_tar(path, [*members, member("clip/.hidden", b"x")], **options)
    return open_store(path, cache)


def test_files_are_read_by_name(store):
    for again in (store, pickle.loads(pickle.dumps(store))):
        for name, content in FILES.items():
            if content:
                for spelled in (name, f"./{name}", name.replace("/", "//"), f"sub/../{name}"):
                    assert again.read(spelled) == content


def test_a_store_is_sent_as_its_name(store):
    assert len(pickle.dumps(store)) < 700


def test_frames_are_sorted_and_hidden_files_left_out(store):
    assert store.frames("clip") == ["clip/00.png", "clip/01.png"]
    assert [store.read(name, "video") for name in store.frames("./clip/")] == [b"0", b"1"]


@pytest.mark.parametrize("name", ["../a.png", "sub/../../a.png", "/etc/passwd", "a/../../folder/a.png"])
def test_no_name_leads_out(store, name):
    for read in (store.read, store.frames):
        with pytest.raises(BadRow, match=r"leads out of|is not in"):
            read(name)


@pytest.mark.parametrize("name", ["absent.png", "A.PNG", "sub/absent", "a.png/x", "x" * 5000, "a\0.png", "\ud800", "é"])
def test_what_is_not_there(store, name):
    for read in (store.read, store.frames):
        with pytest.raises(BadRow, match="is not in"):
            read(name)


def test_what_is_no_file(store):
    for name in ("sub", "clip", "", "."):
        with pytest.raises(BadRow, match=r"is no regular file|is not in"):
            store.read(name)
    with pytest.raises(BadRow, match="is neither a folder of frames nor a video file"):
        store.frames("a.png")


def test_addresses_are_not_fetched(store):
    with pytest.raises(BadRow, match=r"^field image: https://x.org/a.png is an address; nothing is fetched"):
        store.read("https://x.org/a.png")


def test_a_file_that_is_too_large_is_not_read(store, monkeypatch):
    monkeypatch.setattr(stores, "MAX_IMAGE_BYTES", 5)
    assert store.read("a.png") == b"first"
    with pytest.raises(BadRow, match=r"sub/b.jpg in .* has 6 bytes, more than 5$"):
        store.read("sub/b.jpg")


def test_several_threads_read_at_once(store):
    names, wrong = [name for name in FILES if FILES[name]], []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, len(names), 200).tolist():
            if store.read(names[i]) != FILES[names[i]]:
                wrong.append(names[i])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_store_has_no_image(cache):
    for read in (open_store(None, cache).read, open_store(None, cache).frames):
        with pytest.raises(BadRow, match=r"names a.png, but its source has no images folder$"):
            read("a.png")


def test_pipes_sockets_and_folders_never_block(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dir.png").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
        for name in ("pipe.png", "dir.png", "socket.png"):
            with pytest.raises(BadRow, match=f"{name} in .* (is no regular file|cannot be read)"):
                FolderStore(tmp_path).read(name)
    with pytest.raises(UserError, match=r"pipe.png: cannot be read \(no regular file\)$"):
        open_store(tmp_path / "pipe.png", cache)


def test_links_may_point_inside_but_not_out(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "images2").mkdir()
    for path in (root / "a.png", tmp_path / "images2/b.png"):
        path.write_bytes(b"x")
    (root / "inside.png").symlink_to("a.png")
    (root / "outside.png").symlink_to("../images2/b.png")
    (root / "up").symlink_to("..")
    (root / "device.png").symlink_to("/dev/zero")
    store = FolderStore(root)
    assert store.read("inside.png") == b"x"
    for name in ("outside.png", "up/images2/b.png", "device.png"):
        with pytest.raises(BadRow, match="leads out of"):
            store.read(name)


# --- archives --------------------------------------------------------------------------------------------------------


def test_hostile_members_of_a_tar_are_not_there(tmp_path, cache):
    members = [
        member("../up.png", b"1"),
        member("a/../../up.png", b"2"),
        member("/rooted.png", b"3"),
        member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.png", type=tarfile.LNKTYPE, linkname="good.png"),
        member("device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("pipe.png", type=tarfile.FIFOTYPE),
        member("twice.png", b"old"),
        member("good.png", b"4"),
        member("x/" * 60 + "long.png", b"5"),
        member("caf\udce9.png", b"6"),
        member("./twice.png", b"new"),
        member("é.png", b"7"),
    ]
    store = open_store(make_tar(tmp_path / "a.tar", members, format=tarfile.GNU_FORMAT), cache)
    there = {
        name: store.read(name) for name in ("rooted.png", "good.png", "x/" * 60 + "long.png", "twice.png", "é.png")
    }
    assert list(there.values()) == [b"3", b"4", b"5", b"new", b"7"]
    for name in ("up.png", "link.png", "hard.png", "device.png", "pipe.png", "a/up.png"):
        with pytest.raises(BadRow, match="is not in"):
            store.read(name)


def test_a_tar_of_many_files_against_tarfile(tmp_path, cache):
    rng = np.random.default_rng(0)
    contents = {f"{i % 7}/{i:04d}.jpg": rng.bytes(int(rng.integers(1, 2000))) for i in range(500)}
    path = make_tar(tmp_path / "a.tar", [member(name, content) for name, content in contents.items()])
    store = open_store(path, cache)
    assert {name: store.read(name) for name in contents} == contents
    assert store.frames("3") == sorted(name for name in contents if name.startswith("3/"))
    assert len(list(cache.glob("tar-*"))) == 2


def test_the_index_of_a_tar_is_kept(tmp_path, cache, monkeypatch):
    path = make_tar(tmp_path / "a.tar", [member("a.png", b"x")])
    open_store(path, cache)
    monkeypatch.setattr(archives.TarStore, "_entries", None)
    assert open_store(path, cache).read("a.png") == b"x"


def test_a_tar_that_changes_is_noticed(tmp_path, cache):
    path = make_tar(tmp_path / "a.tar", [member("a.png", b"x")])
    store = open_store(path, cache)
    make_tar(path, [member("b.png", b"yy")])
    with pytest.raises(UserError, match="has changed since it was opened"):
        pickle.loads(pickle.dumps(store))
    assert open_store(path, cache).read("b.png") == b"yy"


def test_an_empty_tar(tmp_path, cache):
    with pytest.raises(BadRow, match="is not in"):
        open_store(make_tar(tmp_path / "a.tar", []), cache).read("a.png")


def test_broken_archives(tmp_path, cache):
    whole = make_tar(tmp_path / "a.tar", [member(f"{i}.png", b"x" * 700) for i in range(5)]).read_bytes()
    header = 512 + 1024  # of the second member
    damaged = whole[:header] + b"\xff" * 200 + whole[header + 200 :]
    cases = {
        "cut.tar": (whole[: header + 600], "cut.tar: is cut off: 1.png ends at byte 2748, the file at 2136"),
        "header.tar": (whole[: header + 100], "header.tar: is no .tar from byte 1536 on"),
        "damaged.tar": (damaged, "damaged.tar: is no .tar from byte 1536 on"),
        "text.tar": (b"text" * 500, "text.tar: is no .tar that can be read"),
        "empty.tar": (b"", "empty.tar: is no .tar that can be read (empty file)"),
        "text.png": (b"text", "text.png: is neither a folder, nor a .tar, nor a Parquet file of images"),
        "a.tar.gz": (
            b"\x1f\x8b\x08",
            "is compressed, so no image in it can be reached alone; unpack it to a plain .tar",
        ),
        "a.parquet": (b"PAR1" + b"x" * 100 + b"PAR1", "a.parquet: is no Parquet file that can be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            open_store(tmp_path / name, cache)
        assert message in str(error.value)
    assert list(cache.glob("*.npy")) == []
    # The blocks of zeros at the end may be missing: programs that append leave them out.
    (tmp_path / "open.tar").write_bytes(whole[: 5 * 1536])
    assert open_store(tmp_path / "open.tar", cache).read("4.png") == b"x" * 700


def test_parquet_that_holds_no_images(tmp_path, cache):
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column image with bytes and path; its columns are image, id$"):
        open_store(tmp_path / "a.parquet", cache)
    path = make_parquet(tmp_path / "b.parquet", [{"path": "a.png", "bytes": None}])
    with pytest.raises(BadRow, match=r"a.png in .* has no bytes"):
        open_store(path, cache).read("a.png")


# --- video files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    """A file of 12 frames, losslessly packed, frame i of the grey 10 + 20 i; and its bytes."""
    av = pytest.importorskip("av")
    path = tmp_path / "clips" / "a.mkv"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "bgr0"
        for i in range(12):
            pixels = np.full((24, 32, 3), 10 + 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_frames_of_a_video_file(clip, tmp_path, cache, kind):
    path = clip.parent
    if kind == "tar":
        path = make_tar(tmp_path / "a.tar", [member("a.mkv", clip.read_bytes())])
    store = open_store(path, cache)
    frames = store.frames("a.mkv")
    assert frames == [f"a.mkv#{i}" for i in range(12)]
    for i in (0, 3, 4, 11, 2, 2, 11):
        with Image.open(io.BytesIO(store.read(frames[i], "video"))) as image:
            np.testing.assert_array_equal(np.asarray(image), np.full((24, 32, 3), 10 + 20 * i))


def test_a_broken_video_file(clip):
    store = FolderStore(clip.parent)
    whole = clip.read_bytes()
    for name, content in {"text.mp4": b"text", "empty.mp4": b"", "cut.mkv": whole[:200]}.items():
        (clip.parent / name).write_bytes(content)
        with pytest.raises(BadRow, match=f"^field video: {name} (is no video that can be read|holds no frames)"):
            store.frames(name)
    for number in (12, 999):
        with pytest.raises(BadRow, match=f"a.mkv ends before frame {number} of 12"):
            store.read(f"a.mkv#{number}", "video")


def test_a_folder_may_be_called_as_a_video_file(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "a.mp4" / "0.png").write_bytes(b"x")
    assert FolderStore(tmp_path).frames("a.mp4") == ["a.mp4/0.png"]


def test_without_pyav_a_video_file_says_what_to_install(clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"a.mkv is a video file, which needs PyAV: pip install av$"):
        FolderStore(clip.parent).frames("a.mkv")
