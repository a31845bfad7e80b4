"""Names of exported files: no two clips share one, and every file system takes them."""

from __future__ import annotations

import unicodedata
from pathlib import PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.operate.export import MANIFEST, SHEET, file_stem, portable

IDS = st.sampled_from(["r1-00000", "r1-00001", "r1-00002"])
CUSTOM = st.one_of(
    st.none(),
    IDS,
    IDS.map(lambda clip: f"a-{clip}"),
    st.sampled_from(["a", "A", "ａ", "a-1", "a.", "con", "NUL.txt", "COM¹", "é", "e\u0301", "manifest", "..", " "]),
    st.text(min_size=1, max_size=200),
)


@given(st.lists(st.tuples(CUSTOM, st.integers(0, 2)), max_size=12))
def test_names_are_distinct_on_every_file_system(clips: list[tuple[str | None, int]]) -> None:
    taken: set[str] = set()
    stems = [file_stem(f"r1-{index:05}", custom, sample, taken) for index, (custom, sample) in enumerate(clips)]
    assert len({unicodedata.normalize("NFKC", stem).casefold() for stem in stems}) == len(clips)


@given(st.text(min_size=1))
def test_a_custom_id_becomes_a_name_that_windows_takes(custom_id: str) -> None:
    name = portable(custom_id)
    file = f"{name}.mp4"
    assert not PureWindowsPath(file).is_reserved() and PureWindowsPath(file).name == file
    assert not set(name) & set('<>:"/\\|?*') and name.isprintable()
    assert name == name.strip(" .") and not name.startswith("-") and len(name.encode()) < 160


@pytest.mark.parametrize("device", ["con", "NUL", "aux.x", "Com1", "lpt9.mp4", "COM²"])
def test_a_device_of_windows_is_no_file(device: str) -> None:
    assert PureWindowsPath(device).is_reserved() and not PureWindowsPath(portable(device)).is_reserved()


def test_a_custom_id_that_is_another_clips_id_overwrites_nothing() -> None:
    taken = {MANIFEST.partition(".")[0], SHEET.partition(".")[0]}
    first = file_stem("r1-00000", "R1-00001", 0, taken)
    assert (first, file_stem("r1-00001", None, 0, taken)) == ("R1-00001", "r1-00001-2")
    assert file_stem("r1-00002", "manifest", 0, taken) == "manifest-r1-00002"
