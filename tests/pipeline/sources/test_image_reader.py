"""Laws of reading images: what may be read and from where, and each refusal by name, without a path of the machine."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
from PIL import Image

from coldstill.common import images
from coldstill.pipeline.errors import SourceNotFound
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources import image_reader
from coldstill.pipeline.sources.conversation import RowUnusable
from coldstill.pipeline.sources.image_reader import ImageReader
from coldstill.storage_schema.errors import StorageFailed
from tests.pipeline.sources.image_reading import RED, image_file, read_image, reader_of, refusal_of
from tests.vision import image_bytes

# Kinds of images


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_file(Image.new("RGB", (4, 2), "red"), "JPEG", exif=exif)


KINDS: dict[str, Callable[[], bytes]] = {
    "EXIF": _turned,
    "palette": lambda: image_bytes(1, mode="P"),
    "palette with transparency": lambda: image_file(Image.new("P", (4, 4)), "PNG", transparency=0),
    "alpha": lambda: image_bytes(1, mode="RGBA"),
    "gray with alpha": lambda: image_bytes(1, mode="LA"),
    "black and white": lambda: image_bytes(1, mode="1"),
    "CMYK": lambda: image_bytes(1, mode="CMYK", format="JPEG"),
    "one pixel": lambda: image_bytes(1, size=(1, 1)),
    "20,000 pixels wide": lambda: image_file(Image.new("L", (20_000, 2)), "PNG"),
    "WebP": lambda: image_bytes(1, format="WEBP"),
    "GIF of one frame": lambda: image_bytes(1, mode="P", format="GIF"),
    "BMP": lambda: image_bytes(1, format="BMP"),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_images_of_every_kind_are_stored_as_they_are(kind: Callable[[], bytes]) -> None:
    data = kind()
    assert read_image(data) == data


def _bomb() -> bytes:
    """A PNG whose header says 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def _animated() -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    return image_file(frames[0], "GIF", save_all=True, append_images=frames[1:])


UNUSABLE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "16 bits": (lambda: image_file(Image.new("I;16", (4, 4)), "PNG"), "image_unsupported", "image 0: mode I;16"),
    "animated": (_animated, "image_unsupported", "image 0: 2 frames; wanted one"),
    "truncated": (lambda: image_bytes(1, format="JPEG")[:-200], "image_unreadable", "image 0: OSError: "),
    "another format": (
        lambda: image_file(Image.new("L", (4, 4)), "TIFF"),
        "image_unreadable",
        "image 0: bytes that begin with b'II",
    ),
    "nothing": (lambda: b"", "image_unreadable", "image 0: no bytes; wanted a whole PNG"),
    "no image": (lambda: b"hello", "image_unreadable", "image 0: bytes that begin with b'hello'; wanted a whole PNG"),
    "a bomb": (_bomb, "image_too_large", "image 0: "),
    "too many pixels": (
        lambda: image_file(Image.new("1", (9_000, 8_000)), "PNG"),
        "image_too_large",
        "image 0: 9,000 x 8",
    ),
}


@pytest.mark.parametrize(("data", "reason", "detail"), UNUSABLE.values(), ids=list(UNUSABLE))
def test_images_that_no_model_can_be_shown_are_rejected_by_name(
    data: Callable[[], bytes], reason: str, detail: str
) -> None:
    found = refusal_of(data())
    assert found[0] == reason
    assert found[1].startswith(detail)
    assert "0x" not in found[1]
    assert found == refusal_of(data())


def test_more_bytes_than_an_image_may_have_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.png").write_bytes(RED)
    monkeypatch.setattr(image_reader, "MAX_IMAGE_BYTES", len(RED) - 1)
    assert refusal_of("large.png", str(tmp_path / "x.jsonl")) == (
        "image_too_large",
        f"image 0: more than {len(RED) - 1:,} bytes",
    )
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", len(RED) - 1)
    assert refusal_of(RED)[0] == "image_too_large"


def test_an_image_that_many_rows_have_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = image_reader.decoded
    monkeypatch.setattr(image_reader, "decoded", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))  # type: ignore[func-returns-value]
    reader = reader_of()
    for _ in range(3):
        reader.read([RED, image_bytes(2)], [0, 1])
    assert len(calls) == 2


# Places


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("{}/rows.jsonl", ""),
        ("{}", ""),
        ("{}/*.jsonl", ""),
        ("{}/part-*/rows.jsonl", ""),
        ("{}/a/b/rows.jsonl", "a/b"),
    ],
)
def test_relative_paths_start_at_the_sources_folder(path: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder / "images").mkdir(parents=True)
    (tmp_path / folder / "images" / "x.png").write_bytes(RED)
    assert read_image("images/x.png", path.format(tmp_path)) == RED


def test_relative_paths_start_at_image_root_if_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(RED)
    assert read_image("x.png", image_root=str(tmp_path)) == RED
    assert read_image("x.png", image_root=f"file://{tmp_path}/") == RED


def test_images_of_a_local_dataset_start_at_its_folder_and_those_of_a_hub_dataset_need_a_root(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(RED)
    assert ImageReader(SourceConfig(dataset=str(tmp_path))).read(["x.png"], [0])[0].data == RED
    with pytest.raises(RowUnusable, match=r"a relative path; source\.image_root names the folder"):
        ImageReader(SourceConfig(dataset="some/name")).read(["x.png"], [0])


def test_object_stores_are_read(tmp_path: Path) -> None:
    with fsspec.open("memory://images/a/x.png", "wb") as file:
        file.write(RED)
    assert read_image("memory://images/a/x.png", image_root="memory://images/b") == RED
    assert read_image("memory://images/a/x.png", "memory://images/rows.jsonl") == RED
    assert read_image("a/x.png", image_root="memory://images") == RED
    assert read_image("x.png", "memory://images/a/rows.jsonl") == RED
    for place in ("y.png", "a", ""):
        assert refusal_of(f"memory://images/{place}", image_root="memory://images")[0] == "image_not_found"


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("memory://images/a/x.png", {}),
        ("memory://images/a/x.png", {"image_root": "memory://image"}),
        ("memory://images/a/x.png", {"path": "memory://other/rows.jsonl"}),
        ("s3://private/x.png", {"path": "gs://private/rows.jsonl"}),
        ("hf://datasets/a/b/x.png", {"path": "hf://datasets/a/bc/rows.jsonl"}),
        ("hf://datasets/a/b/x.png", {"path": None, "dataset": "a/bc"}),
    ],
)
def test_a_row_cannot_name_a_store_that_the_settings_do_not(place: str, settings: dict[str, Any]) -> None:
    """Or anybody's row could be answered with the user's own keys, or hold up the capture."""
    reader = ImageReader(SourceConfig(**{"path": "rows.jsonl", **settings}))
    with pytest.raises(RowUnusable, match=r"image_not_found.* another store than that of the source"):
        reader.read([place], [0])


def test_the_files_of_a_hub_dataset_are_read_from_its_own_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(image_reader, "_from_store", lambda url, what: asked.append(url) or RED)  # type: ignore[func-returns-value]
    places = ["hf://datasets/a/b/x.png", "hf://datasets/a/b@main/x.png"]
    ImageReader(SourceConfig(dataset="a/b")).read(places, [0, 1])
    ImageReader(SourceConfig(path="hf://datasets/a/b@main/rows.jsonl")).read(places, [0, 1])
    assert asked == places * 2


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("absent.png", "'absent.png': No such file or directory"),
        ("folder", "'folder': not a file"),
        ("pipe", "'pipe': not a file"),
        ("/dev/zero", "'zero': not a file"),
        ("x.png/y", "'x.png/y': Not a directory"),
        ("a" * 300, f"'...{'a' * 120}': File name too long"),
        ("nul\0byte", "'nul␀byte': not a path"),
        (
            "ftp://host/x.png",
            "'ftp://host/x.png': addresses of this kind are not read; wanted a path, or an address of",
        ),
        ("simplecache::http://host/x.png", "'simplecache::http://host/x.png': addresses of this kind are not read"),
        ("zip://x.png::s3://a/b.zip", "'zip://x.png::s3://a/b.zip': addresses of this kind are not read"),
        (
            "https://elsewhere.org/x.png?key=1",
            "'https://elsewhere.org/x.png': host elsewhere.org is not in source.image_hosts",
        ),
        ("http://good.org@elsewhere.org/x", "'http://good.org@elsewhere.org/x': not an address of a host"),
        ("http://good.org:81/x", "'http://good.org:81/x': host good.org:81 is not in source.image_hosts"),
        ("http://[bad/x", "'http://[bad/x': not an address"),
        ("https:x.png", "'https:x.png': not an address of a host"),
    ],
)
def test_places_that_cannot_be_read_are_rejected_without_a_path_of_the_machine(
    place: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.png").write_bytes(RED)
    os.mkfifo(tmp_path / "pipe")
    reason, detail = refusal_of(place, str(tmp_path / "rows.jsonl"), image_hosts=("good.org",))
    assert reason == "image_not_found"
    assert detail.startswith(f"image 0, {why}")
    assert str(tmp_path) not in detail


@pytest.mark.parametrize("remote", [False, True], ids=["local", "of a store"])
def test_a_root_that_does_not_exist_stops_the_capture(remote: bool, tmp_path: Path) -> None:
    """Each row with an image would be rejected, and those of text captured."""
    start = "memory://root-test" if remote else str(tmp_path)
    path, roots = f"{start}/rows.jsonl", [f"{start}/{name}" for name in ("image", "images")]
    with fsspec.open(f"{roots[1]}/x.png", "wb") as file:
        file.write(RED)
    for place in ("x.png", "absent.png"):
        with pytest.raises(SourceNotFound, match=r"source\.image_root .*/image\n.*no such folder"):
            reader_of(path, image_root=roots[0]).read([place], [0])
    reader = reader_of(path, image_root=roots[1])
    for _ in range(2):
        with pytest.raises(RowUnusable, match="image_not_found"):
            reader.read(["absent.png"], [0])
    assert reader.read(["x.png"], [0])[0].data == RED


@pytest.mark.parametrize("name", ["a b.png", "50%.png", "50%25.png", "ä#?.png"])
def test_a_file_address_may_be_quoted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(RED)
    for place in ((tmp_path / name).as_uri(), f"file://{tmp_path}/{name}", f"file:{tmp_path}/{name}"):
        assert read_image(place) == RED


def test_the_users_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(RED)
    assert read_image("x.png", image_root="~/data") == RED
    assert read_image("data/x.png", path="~/rows.jsonl") == RED


def test_a_root_that_goes_away_stops_the_capture(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    reader = reader_of(image_root=str(tmp_path / "images"))
    with pytest.raises(RowUnusable, match="image_not_found"):
        reader.read(["absent.png"], [0])
    (tmp_path / "images").rmdir()
    with pytest.raises(SourceNotFound, match=r"source\.image_root"):
        reader.read(["absent.png"], [0])


def test_a_disk_that_fails_is_no_reject_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: str) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    reader = reader_of(str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(image_reader.os, "stat", failing)
    with pytest.raises(StorageFailed, match="Stale"):
        reader.read([str(tmp_path / "x.png")], [0])


@pytest.mark.parametrize("host", ["https://images.example.com", "example.com/images", "*.example.com", "", "a@b.org"])
def test_what_is_no_host_is_refused_where_hosts_are_named(host: str) -> None:
    """It would match no address, and each row with one would be rejected."""
    with pytest.raises(ValueError, match=r"hosts such as images\.example\.com"):
        reader_of(image_hosts=[host])


@pytest.mark.parametrize("source", [{"path": "memory://a/rows.jsonl"}, {"dataset": "some/name"}])
def test_rows_of_another_machine_do_not_read_this_ones_files(source: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(RED)
    (tmp_path / "root").mkdir()
    reader = ImageReader(SourceConfig(**source, image_root=str(tmp_path / "root")))
    for place in (
        str(tmp_path / "x.png"),
        f"file://{tmp_path}/x.png",
        f"file:{tmp_path}/x.png",
        "../x.png",
        "a/../../x.png",
        "file:%2e%2e/x.png",
        f"file:{quote(str(tmp_path / 'x.png'), safe='')}",
    ):
        with pytest.raises(RowUnusable, match="image_not_found"):
            reader.read([place], [0])
    (tmp_path / "root" / "x.png").write_bytes(RED)
    assert reader.read(["x.png"], [0])[0].data == RED
