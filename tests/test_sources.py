"""Images found by file, folder and pattern, and the names of their predictions."""

import os
from pathlib import Path, PurePath

import pytest

from evaluation.sources import Source, Sources, find_sources, name_predictions


def plant(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


def found_in(root: Path, *inputs: str) -> list[str]:
    """Return the paths found, below the root, and require that there was no problem."""
    sources = find_sources([str(root / text) for text in inputs], root / "out")
    assert sources.problems == []
    return [source.absolute.relative_to(root).as_posix() for source in sources.images]


def predictions(root: Path, *inputs: str) -> dict[str, str]:
    """Return the name of each image's prediction, by the image's path below the root."""
    sources = find_sources([str(root / text) for text in inputs], root / "out").images
    names = name_predictions(sources)
    return {
        source.absolute.relative_to(root).as_posix(): name.as_posix()
        for source, name in zip(sources, names, strict=True)
    }


def test_folder_is_searched_at_every_depth_without_hidden_and_other_files(tmp_path: Path) -> None:
    plant(tmp_path, "p/b.JPG", "p/a.png", "p/s/t/c.webp", "p/notes.txt", "p/.a.jpg", "p/.git/x.png", "p/d.jpg/e.gif")
    assert found_in(tmp_path, "p") == ["p/a.png", "p/b.JPG", "p/d.jpg/e.gif", "p/s/t/c.webp"]


def test_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    plant(tmp_path, "image.dat", ".hidden", "a[1]*.jpg")
    assert found_in(tmp_path, "image.dat", ".hidden", "a[1]*.jpg") == ["image.dat", ".hidden", "a[1]*.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["1.jpg"]),
        ("*", ["1.jpg", "a/2.jpg", "a/b/3.png", "c/4.jpg"]),
        ("?/*.jpg", ["a/2.jpg", "c/4.jpg"]),
        ("[!a]/*", ["c/4.jpg"]),
        ("**/*.jpg", ["1.jpg", "a/2.jpg", "c/4.jpg"]),
        ("a/**", ["a/2.jpg", "a/b/3.png"]),
        ("**/b", ["a/b/3.png"]),
        ("**/b/*", ["a/b/3.png"]),
    ],
)
def test_pattern_that_the_shell_did_not_expand_is_expanded(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    plant(tmp_path, "1.jpg", "a/2.jpg", "a/b/3.png", "c/4.jpg", "a/notes.txt")
    assert sorted(found_in(tmp_path, pattern)) == expected


def test_pattern_keeps_the_folders_below_its_fixed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "v/a/1.jpg", "v/b/2.jpg")
    assert predictions(tmp_path, "v/**/*.jpg") == {"v/a/1.jpg": "a/1.png", "v/b/2.jpg": "b/2.png"}
    monkeypatch.chdir(tmp_path / "v")
    assert [source.relative for source in find_sources(["*/*.jpg"], Path("out")).images] == [
        PurePath("a/1.jpg"),
        PurePath("b/2.jpg"),
    ]


@pytest.mark.parametrize("text", ["p", "p/**/*.jpg", "p/**"])
def test_links_in_circles_are_followed_once(tmp_path: Path, text: str) -> None:
    plant(tmp_path, "p/a.jpg", "p/s/b.jpg", "other/c.jpg")
    for link in ("loop", "again", "s/up"):
        (tmp_path / "p" / link).symlink_to(tmp_path / "p")
    (tmp_path / "p" / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "p" / "a-link-to-s").symlink_to("s")  # sorts before s, but s is found by its own name
    assert found_in(tmp_path, text) == ["p/a.jpg", "p/s/b.jpg", "p/elsewhere/c.jpg"]


def test_unreadable_files_are_reported_and_a_pipe_is_not_opened(tmp_path: Path) -> None:
    plant(tmp_path, "p/a.jpg")
    os.mkfifo(tmp_path / "p" / "pipe.jpg")
    (tmp_path / "p" / "lost.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "p" / "itself.jpg").symlink_to("itself.jpg")
    expected = [
        "itself.jpg: a link to itself.jpg, which cannot be read (Too many levels of symbolic links)",
        "lost.jpg: a link to nowhere.jpg, which cannot be read (No such file or directory)",
        "pipe.jpg: not a file but a pipe, socket or device",
    ]
    for inputs in (["p"], ["p/*"], ["p/**"], ["p/itself.jpg", "p/lost.jpg", "p/pipe.jpg", "p/a.jpg"]):
        sources = find_sources([str(tmp_path / text) for text in inputs], tmp_path / "out")
        assert [Path(problem).name for problem in sources.problems] == expected
        assert len(sources.images) == 1


def test_inputs_without_images_are_reported(tmp_path: Path) -> None:
    sources = find_sources(["", str(tmp_path / "*.jpg"), str(tmp_path / "no.jpg"), str(tmp_path)], tmp_path / "out")
    assert sources == Sources(
        problems=[
            "an input without a name: an empty variable of the shell?",
            f"{tmp_path}/*.jpg: no image matches",
            f"{tmp_path}/no.jpg: No such file or directory",
        ]
    )


def test_output_below_the_input_is_skipped(tmp_path: Path) -> None:
    plant(tmp_path, "a.jpg", "out/a.png", "out/s/b.png")
    for text in (".", "*", "**/*.*", "**"):
        assert found_in(tmp_path, text) == ["a.jpg"]
    (problem,) = find_sources([str(tmp_path / "out")], tmp_path / "out").problems
    assert problem.endswith("out: is the folder that predictions are written to")


def test_a_file_counts_once_however_its_path_is_spelled(tmp_path: Path) -> None:
    plant(tmp_path, "p/a.jpg", "p/b.jpg")
    spellings = ["p/a.jpg", "p/../p/a.jpg", "p/./a.jpg", "p", "p/*.jpg"]
    sources = find_sources([str(tmp_path / text) for text in spellings], tmp_path / "out")
    assert [source.path.name for source in sources.images] == ["a.jpg", "b.jpg"]
    assert sources.num_repeated == 5


# Names


def test_sub_folders_are_kept_and_names_get_another_suffix(tmp_path: Path) -> None:
    plant(tmp_path, "p/a.jpg", "p/s/a.JPEG", "p/two.dots.png")
    assert predictions(tmp_path, "p") == {
        "p/a.jpg": "a.png",
        "p/s/a.JPEG": "s/a.png",
        "p/two.dots.png": "two.dots.png",
    }


def test_images_of_one_folder_that_differ_in_their_suffix_keep_it(tmp_path: Path) -> None:
    plant(tmp_path, "p/a.jpg", "p/a.png", "p/b.jpg")
    assert list(predictions(tmp_path, "p").values()) == ["a.jpg.png", "a.png.png", "b.png"]


def test_an_image_beside_a_folder_of_its_predictions_name(tmp_path: Path) -> None:
    plant(tmp_path, "p/x.jpg", "p/x.png/y.jpg")
    assert list(predictions(tmp_path, "p").values()) == ["x.jpg.png", "x.png/y.png"]


def test_folders_with_several_equal_names_go_no_deeper_than_needed(tmp_path: Path) -> None:
    plant(tmp_path, *(f"{folder}/{number}.jpg" for folder in ("v", "w") for number in range(4)))
    expected = [f"{folder}/{number}.png" for folder in ("v", "w") for number in range(4)]
    assert list(predictions(tmp_path, "v", "w").values()) == expected


def test_folders_with_equal_names_in_them_get_folders_of_their_own(tmp_path: Path) -> None:
    plant(tmp_path, "v/1.jpg", "v/2.jpg", "w/1.jpg", "x/3.jpg")
    expected = ["v/1.png", "v/2.png", "w/1.png", "3.png"]
    assert list(predictions(tmp_path, "v", "w", "x").values()) == expected
    assert list(predictions(tmp_path, "v/1.jpg", "v/2.jpg", "w/1.jpg", "x/3.jpg").values()) == expected


def test_folders_of_one_name_are_distinguished_by_their_parents(tmp_path: Path) -> None:
    plant(tmp_path, "one/v/1.jpg", "two/v/1.jpg")
    assert list(predictions(tmp_path, "one/v", "two/v").values()) == ["one/v/1.png", "two/v/1.png"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "A.jpg", "a.JPG", "a-2.jpg", "a.jpg-2.jpg"],
        ["a.jpg", "a.png", "a.jpg.jpg", "a.jpg.png", "a.jpg.png.png"],
        [".jpg", ".jpg.png"],
    ],
)
def test_no_two_names_are_equal_even_if_letter_case_is_ignored(names: list[str]) -> None:
    sources = [Source(Path("/r") / name, Path("/r"), PurePath(name)) for name in names]
    sources += [Source(Path("/r/s") / name, Path("/r/s"), PurePath(name)) for name in names]
    given = [str(name).casefold() for name in name_predictions(sources)]
    assert len(set(given)) == len(given) == 2 * len(names)
