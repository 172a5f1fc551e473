"""Landmarks: the one reader of them; an image never gets another image's points."""

import os

import numpy as np
import pytest

from data_tools.common.errors import UserError, UserKeyError
from data_tools.images.image_table import Names
from data_tools.images.landmarks import points_of, read_landmarks


def numbers(first):
    return [first + k for k in range(10)]


def line(name, first, separator=" ", score=None):
    fields = [name, *([] if score is None else [score]), *numbers(first)]
    return separator.join(map(str, fields)) + "\n"


def write(tmp_path, *lines):
    (tmp_path / "marks.txt").write_text("".join(lines))
    return tmp_path / "marks.txt"


def test_people_with_files_of_the_same_name_keep_their_own_points(tmp_path):
    """CFP: 500 people have a frontal/05.jpg each."""
    people = [f"{k:03d}/{side}/05.jpg" for k in range(20) for side in ("frontal", "profile")]
    marks = write(tmp_path, *(line(name, 10 * k) for k, name in enumerate(people)))
    landmarks = read_landmarks(marks)
    for k, name in enumerate(people):
        assert landmarks[name].ravel().tolist() == numbers(10 * k)


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "  "])
@pytest.mark.parametrize("score", [None, 0.97, 1])
@pytest.mark.parametrize("name", ["Ann B/my photo 1.jpg", "p0/0.png", "./p0/0.jpg", "p 3/0004.jpg"])
def test_every_separator_with_spaces_in_names(tmp_path, separator, score, name):
    landmarks = read_landmarks(write(tmp_path, "# made\n\n", line(name, 5, separator, score)))
    assert landmarks[name].ravel().tolist() == numbers(5)
    assert landmarks[os.path.normpath(name)].tolist() == landmarks[f"./{name}"].tolist()


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_line_ends(tmp_path, ends):
    text = "\ufeff" + line("a/0.jpg", 0) + line("a/1.jpg", 9) + "\n \n"
    (tmp_path / "marks.txt").write_bytes(text.replace("\n", ends).encode())
    landmarks = read_landmarks(tmp_path / "marks.txt")
    assert landmarks["a/0.jpg"][0, 0] == 0 and landmarks["a/1.jpg"][0, 0] == 9


def test_paths_that_start_higher_or_lower(tmp_path):
    marks = write(tmp_path, line("/data/RFW/Asian/m.0a/1.jpg", 0), line("2.jpg", 50))
    landmarks = read_landmarks(marks)
    assert landmarks["m.0a/1.jpg"][0, 0] == 0 and landmarks["m.0b/2.jpg"][0, 0] == 50
    assert landmarks.get("m.0c/1.jpg") is None  # the same file name, another person
    with pytest.raises(UserKeyError, match=r"marks.txt: no landmarks of 'm.0c/1.jpg'; its first"):
        landmarks["m.0c/1.jpg"]


def test_the_longest_end_counts(tmp_path):
    marks = write(
        tmp_path, line("05.jpg", 0), line("frontal/05.jpg", 20), line("001/frontal/05.jpg", 40)
    )
    assert read_landmarks(marks)["x/001/frontal/05.jpg"][0, 0] == 40
    marks = write(tmp_path, line("05.jpg", 0), line("Images/001/05.jpg", 20))
    assert read_landmarks(marks)["001/05.jpg"][0, 0] == 20


def test_a_line_that_fits_two_images_and_two_lines_that_fit_one(tmp_path):
    landmarks = read_landmarks(write(tmp_path, line("05.jpg", 0)))
    assert landmarks["001/05.jpg"].tolist() == landmarks["001/05.jpg"].tolist()
    with pytest.raises(UserError, match="line 1: '05.jpg' fits two images, '001/05.jpg' and '002/"):
        landmarks["002/05.jpg"]
    landmarks = read_landmarks(write(tmp_path, line("a/1/0.jpg", 0), line("b/1/0.jpg", 1)))
    with pytest.raises(UserError, match="'1/0.jpg' is the end of the names of 2 lines, 1 .* and 2"):
        landmarks["1/0.jpg"]


def test_a_name_on_two_lines(tmp_path):
    marks = write(tmp_path, line("a.jpg", 0), line("b.jpg", 0), line("./a.jpg", 1))
    with pytest.raises(UserError, match="marks.txt: two lines for 'a.jpg': 1 and 3"):
        read_landmarks(marks)


@pytest.mark.parametrize(
    "bad",
    [
        "a.jpg 1 2 3", "a.jpg", "1 2 3 4 5 6 7 8 9 10", "a.jpg " + "1 " * 9 + "x",
        "a.jpg " + "1 " * 9 + "nan", "a.jpg " + "1 " * 9 + "1e999", "a.jpg " + "1 " * 12,
        "\t" + "1\t" * 9 + "1",
    ],
)  # fmt: skip
def test_what_is_no_line_is_named(tmp_path, bad):
    with pytest.raises(UserError, match="marks.txt: line 3"):
        read_landmarks(write(tmp_path, line("0.jpg", 0), "\n", bad + "\n"))


def test_many_at_once_are_as_one_by_one(tmp_path):
    names = [f"{k}/{j}.jpg" for k in range(5) for j in range(4)]
    marks = write(tmp_path, *(line(f"tree/{n}", 7 * i) for i, n in enumerate(names) if i != 3))
    points, unused = read_landmarks(marks).points_of(Names.of(n.encode() for n in [*names[:-1]]))
    assert unused == 1 and np.isnan(points[3]).all()
    one = read_landmarks(marks)
    for i in (0, 1, 2, *range(4, 19)):
        assert points[i].tolist() == one[names[i]].tolist()
    with pytest.raises(UserError, match="fits two images, '1/0.jpg' and 'x/tree/1/0.jpg'"):
        read_landmarks(marks).points_of(Names.of([b"1/0.jpg", b"x/tree/1/0.jpg"]))


def test_a_directory_by_the_whole_path(tmp_path):
    for k in range(2):
        (tmp_path / "m" / f"{k}").mkdir(parents=True)
        rows = "\n".join(f"{k} {j}" for j in range(5))
        (tmp_path / "m" / f"{k}" / "01_5loc_attri.txt").write_text(rows)
    (tmp_path / "m" / "flat.pts").write_text("\ufeffversion: 1\nn_points: 5\n{\n" + rows + "\n}\n")
    landmarks = read_landmarks(tmp_path / "m")
    assert [landmarks[f"x/{k}/01.jpg"][0, 0] for k in range(2)] == [0, 1]
    assert landmarks["a/flat.jpg"].tolist() == [[1, j] for j in range(5)]
    with pytest.raises(UserError, match="flat.pts fits two images, 'a/flat.jpg' and 'b/flat.jpg'"):
        landmarks["b/flat.jpg"]
    with pytest.raises(UserKeyError, match="no landmarks of 'b/none.jpg': none of b/none_5loc"):
        landmarks["b/none.jpg"]


def test_images_without_points_are_counted(tmp_path):
    landmarks = read_landmarks(write(tmp_path, line("a.jpg", 0)))
    assert points_of(landmarks, ["a.jpg"]).shape == (1, 5, 2)
    with pytest.raises(UserError, match="no landmarks for 2 of 3 images, the first b.jpg"):
        points_of(landmarks, ["a.jpg", "b.jpg", "c.jpg"])
