"""Somebody's own videos and images become clips: real files, written with one library and read with another."""

from pathlib import Path

import numpy as np
import pytest

from model.config import ClipShape
from model.train.data import BadData, Bucket, Cut, Source, digest, load_list, save_list, scan, world_cuts
from tests.videos import clip_of, on_its_side, write_folder, write_video

SHAPES = [
    ClipShape(64, 64, 17),
    ClipShape(96, 64, 17),
    ClipShape(64, 64, 9),
    ClipShape(96, 64, 9),
    ClipShape(64, 64, 1),
    ClipShape(96, 64, 1),
]


def cuts_of(folder: Path, fps: int = 8) -> list[tuple[str, int, str]]:
    return [(cut.file, cut.start, str(cut.shape)) for cut in scan(folder, SHAPES, fps).cuts]


def test_a_video_is_cut_into_the_longest_clips_that_fit_and_the_nearest_shape(tmp_path: Path) -> None:
    write_video(tmp_path / "square.mp4", clip_of(1, 64, 64, 45))
    write_video(tmp_path / "wide.mp4", clip_of(2, 160, 96, 9))
    write_video(tmp_path / "sub" / "still.png", clip_of(3, 128, 120, 1))
    assert cuts_of(tmp_path) == [
        ("square.mp4", 0, "64x64x17"),
        ("square.mp4", 17, "64x64x17"),
        ("square.mp4", 34, "64x64x9"),
        ("sub/still.png", 0, "64x64x1"),
        ("wide.mp4", 0, "96x64x9"),
    ]


def test_the_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    clip = clip_of(4, 64, 64, 33)
    write_video(tmp_path / "a.mp4", clip)
    source, cuts = Source(folder=tmp_path), scan(tmp_path, SHAPES, 8).cuts
    for cut, read in zip(cuts, source.read(cuts), strict=True):
        assert read.shape == (cut.shape.frames, 64, 64, 3)
        assert np.abs(read.astype(int) - clip[cut.start : cut.start + cut.shape.frames]).mean() < 4  # H.264 loses some
    (second,) = source.read(cuts[1:])
    assert np.array_equal(second, list(source.read(cuts))[1])  # wherever reading begins


def test_a_faster_video_loses_frames_and_a_larger_one_its_sides(tmp_path: Path) -> None:
    clip = clip_of(5, 128, 64, 49)
    write_video(tmp_path / "fast.mp4", clip, fps=24)
    (cut,) = scan(tmp_path, [ClipShape(64, 64, 9)], 8).cuts[:1]
    (read,) = Source(folder=tmp_path).read([cut])
    assert np.abs(read.astype(int) - clip[0:27:3, :, 32:96]).mean() < 4


def test_a_turned_video_is_read_upright(tmp_path: Path) -> None:
    clip = clip_of(5, 64, 96, 9)
    write_video(tmp_path / "a.mp4", clip)
    (tmp_path / "a.mp4").write_bytes(on_its_side((tmp_path / "a.mp4").read_bytes()))
    (cut,) = scan(tmp_path, SHAPES, 8).cuts
    assert str(cut.shape) == "96x64x9"
    (read,) = Source(folder=tmp_path).read([cut])
    assert np.abs(read.astype(int) - np.rot90(clip, -1, axes=(1, 2))).mean() < 4


def test_captions_come_from_files_beside_and_from_tables(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        write_video(tmp_path / "in" / f"{name}.mp4", clip_of(6))
    (tmp_path / "in" / "a.txt").write_text("a ball\nrolls ")
    (tmp_path / "in" / "b.json").write_text('{"caption": "a cube"}')
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "in/c.mp4", "text": "a cone"}\n\n{"file_name": "in/a.mp4", "text": "nothing"}\n'
    )
    (tmp_path / "in" / "metadata.csv").write_text('file_name,prompt\nd.mp4,"a can, blue"\n')
    captions = {cut.file[3]: cut.caption for cut in scan(tmp_path, SHAPES, 8).cuts}
    assert captions == {"a": "a ball rolls", "b": "a cube", "c": "a cone", "d": "a can, blue", "e": ""}


def test_all_errors_of_the_tables_are_said_at_once(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clip_of(7))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "x"}\nnonsense\n{"file_name": "a.mp4"}\n')
    with pytest.raises(BadData) as caught:
        scan(tmp_path, SHAPES, 8)
    first, second, third = str(caught.value).splitlines()
    assert "metadata.jsonl:1" in first and "'b.mp4'" in first
    assert "metadata.jsonl:2" in second and "metadata.jsonl:3" in third


def test_files_that_cannot_be_used_are_named_and_the_others_are(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", clip_of(8))
    write_video(tmp_path / "short.mp4", clip_of(8, frames=5))
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "broken.png").write_bytes(b"no image")
    scanned = scan(tmp_path, [ClipShape(64, 64, 9)], 8)
    assert [cut.file for cut in scanned.cuts] == ["good.mp4"]
    assert [line.partition(":")[0] for line in scanned.unused] == ["broken.mp4", "broken.png", "short.mp4"]
    (tmp_path / "none").mkdir()
    with pytest.raises(BadData, match="no videos"):
        scan(tmp_path / "none", SHAPES, 8)


def test_a_list_gives_the_cuts_back_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "videos", 3)
    source, cuts = Source(folder=folder), scan(folder, SHAPES, 8).cuts
    save_list(tmp_path / "cuts.jsonl", source, cuts)
    assert load_list(tmp_path / "cuts.jsonl") == (source, cuts)
    write_video(folder / "01.mp4", clip_of(99))
    with pytest.raises(BadData, match=r"01\.mp4 has changed"):
        list(source.read(cuts))


def test_the_digest_follows_from_content_not_from_names(tmp_path: Path) -> None:
    before = scan(write_folder(tmp_path / "a", 3), SHAPES, 8).cuts
    renamed = write_folder(tmp_path / "b", 3)
    for path in sorted(renamed.iterdir()):
        path.rename(path.with_name(f"clip-{path.name}"))
    assert digest(scan(renamed, SHAPES, 8).cuts, 8) == digest(before, 8)
    (renamed / "clip-01.txt").write_text("something else")
    assert digest(scan(renamed, SHAPES, 8).cuts, 8) != digest(before, 8)


def test_the_world_is_a_source_too() -> None:
    cuts = list(world_cuts(3, [Bucket(shape=ClipShape(32, 32, 9), clips=2, share=1, batch=1)]))
    small, large = (list(Source(seed=3).read([_sized(cut, size) for cut in cuts])) for size in (32, 64))
    assert [clip.shape for clip in small] == [(9, 32, 32, 3)] * 2 and large[0].shape == (9, 64, 64, 3)
    for a, b in zip(small, large, strict=True):  # the same scenes, whatever the size
        assert np.abs(a.astype(int) - b[:, ::2, ::2]).mean() < 20
    assert all(cut.caption for cut in cuts)


def _sized(cut: Cut, size: int) -> Cut:
    return Cut(file=cut.file, sha256=cut.sha256, start=0, shape=ClipShape(size, size, 9), caption=cut.caption)
