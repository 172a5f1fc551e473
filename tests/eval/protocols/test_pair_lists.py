"""The official lists of pairs: each format, folds, absent images, landmarks, what is refused."""

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from data_tools.images.landmarks import read_landmarks
from data_tools.images.template import TEMPLATE
from eval.embedders.images import FIVE_POINTS
from eval.protocols import pair_lists, score_pairs
from tests.eval import official
from tests.real import REAL, real

COLORS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}


def flat(path, color, size=112):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = ".png" if path.suffix == ".png" else ".jpg"
    pixels = np.full((size, size, 3), COLORS[color], np.uint8)
    path.write_bytes(cv2.imencode(kind, pixels[..., ::-1])[1].tobytes())


def colors(pairs):
    """[(colour, colour)] of each pair, as the decoded images show them."""
    names = list(COLORS)

    def name(i):
        pixel = pairs.images[int(i)][56, 56].astype(int)
        return min(names, key=lambda x: abs(pixel - COLORS[x]).sum())

    return [(name(a), name(b)) for a, b in zip(pairs.first, pairs.second, strict=True)]


@pytest.fixture
def faces(tmp_path):
    root = tmp_path / "images"
    flat(root / "Ann_A" / "Ann_A_0001.jpg", "red")
    flat(root / "Ann_A" / "Ann_A_0012.jpeg", "green")
    flat(root / "Bo" / "Bo_0001.jpg", "red")
    flat(root / "Cy" / "Cy_0001.png", "blue")
    return root


def load(faces, text, name="pairs.txt", **options):
    path = faces.parent / name
    path.write_text(text)
    return pair_lists.load_list(path, faces, **options)


@pytest.mark.parametrize("header", ["", "1\t1\n"])
def test_lfw(faces, header):
    pairs = load(faces, header + "Ann_A\t1\t12\nBo\t1\tCy\t1\n")
    assert pairs.name == "pairs" and pairs.missing == ()
    assert colors(pairs) == [("red", "green"), ("red", "blue")]
    assert pairs.issame.tolist() == [True, False]


def test_back_slashes_in_a_list_are_read_with_a_word(faces):
    pairs = load(faces, "Ann_A\\Ann_A_0001\tBo\\Bo_0001\t0\nBo/Bo_0001\tAnn_A/Ann_A_0012\t1\n")
    assert colors(pairs) == [("red", "red"), ("red", "green")]
    said = score_pairs.set_warning(pairs)
    assert "pairs.txt: the back slashes in 1 of its lines are read as slashes" in said
    assert "back slash" not in score_pairs.set_warning(load(faces, "Ann_A\t1\t12\n"))


def test_each_image_is_embedded_once(faces):
    pairs = load(faces, "Ann_A 1 12\n" * 5 + "Ann_A 1 Cy 1\n" * 5)
    assert len(pairs.images) == 3 and len(pairs.issame) == 10


def test_folds_of_a_list_without_folds_hold_both_kinds(faces):
    # View 1 of LFW: all same pairs, then all different ones. View 2 keeps its order.
    same, different = "Ann_A 1 12\n", "Bo 1 Cy 1\n"
    pairs = load(faces, "40\n" + same * 40 + different * 40)
    assert pairs.issame.reshape(10, 8).sum(axis=1).tolist() == [4] * 10
    for kind, pair in zip(pairs.issame, colors(pairs), strict=True):
        assert pair == (("red", "green") if kind else ("red", "blue"))
    view2 = load(faces, "2 20\n" + 2 * (same * 20 + different * 20))
    assert view2.issame.tolist() == 2 * ([True] * 20 + [False] * 20)


def test_calfw_pairs_are_two_lines_and_fall_into_its_folds(tmp_path):
    root, lines = tmp_path / "images", []
    for k in range(20):
        for side in (1, 2):
            flat(root / f"P{k}_{side:04d}.jpg", "red" if side == 1 else "green")
    for k in range(20):  # same pairs with their fold 1 .. 10, then different ones with 0
        lines += [f"P{k}_0001.jpg {k // 2 + 1}", f"P{k}_0002.jpg {k // 2 + 1}"]
    for k in range(20):
        lines += [f"P{k}_0001.jpg 0", f"P{(k + 1) % 20}_0002.jpg 0"]
    path = tmp_path / "pairs_CALFW.txt"
    path.write_text("\n".join(lines))
    pairs = pair_lists.load_list(path, root)
    assert set(colors(pairs)) == {("red", "green")} and len(pairs.issame) == 40
    assert pairs.issame.reshape(10, 4).sum(axis=1).tolist() == [2] * 10
    files = [(pairs.images.paths[a], pairs.images.paths[b])
             for a, b in zip(pairs.first, pairs.second, strict=True)]  # fmt: skip
    for fold in range(10):  # fold f: same pairs 2f and 2f + 1, different pairs 2f and 2f + 1
        part = {(a, b) for a, b in files[4 * fold : 4 * fold + 4]}
        own = [f"P{k}_0001.jpg" for k in (2 * fold, 2 * fold + 1)]
        assert part == {(a, f"P{k}_0002.jpg") for a, n in zip(own, (0, 1), strict=True)
                        for k in (2 * fold + n, (2 * fold + n + 1) % 20)}  # fmt: skip


@pytest.fixture
def cfp(tmp_path):
    protocol = tmp_path / "Protocol"
    for kind, folder, color in (("F", "frontal", "red"), ("P", "profile", "blue")):
        rows = []
        for k in range(1, 5):
            flat(tmp_path / "Data" / "Images" / "001" / folder / f"{k:02d}.jpg", color)
            rows.append(f"{k} ../Data/Images/001/{folder}/{k:02d}.jpg")
        protocol.mkdir(exist_ok=True)
        (protocol / f"Pair_list_{kind}.txt").write_text("\n".join(rows) + "\n")
    for split in ("FP", "FF"):
        for fold in range(1, 11):
            folder = protocol / "Split" / split / f"{fold:02d}"
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text("1,2\n3,4\n")
            (folder / "diff.txt").write_text("2,1\n")
    return tmp_path


@pytest.mark.parametrize("split, second", [("FP", "blue"), ("FF", "red")])
def test_cfp(cfp, split, second):
    pairs = pair_lists.load_list(cfp / "Protocol" / "Split" / split, cfp / "Data" / "Images")
    assert pairs.name == f"cfp_{split.lower()}"
    assert pairs.issame.tolist() == [True, True, False] * 10
    assert set(colors(pairs)) == {("red", second)}


def test_cfp_names_a_wrong_line(cfp):
    wrong = cfp / "Protocol" / "Split" / "FP" / "03" / "diff.txt"
    wrong.write_text("2,1\n2,9\n")
    with pytest.raises(ValueError, match=r"03/diff.txt:2: '2,9' is not 'i,j'"):
        pair_lists.load_list(cfp / "Protocol" / "Split" / "FP", cfp / "Data" / "Images")
    (cfp / "Protocol" / "Pair_list_P.txt").unlink()
    with pytest.raises(FileNotFoundError, match="Pair_list_P.txt: not there; CFP: .*cfpw.io"):
        pair_lists.load_list(cfp / "Protocol" / "Split" / "FP", cfp / "Data" / "Images")


def test_agedb(tmp_path):
    root = tmp_path / "images"
    for k in range(4):
        flat(root / f"{k}_Name_{20 + k}_m.jpg", "red" if k % 2 == 0 else "green")

    def cells(texts):
        wrapped = np.empty(len(texts), dtype=object)
        for i, text in enumerate(texts):
            wrapped[i] = {"name": text}
        return wrapped

    splits = np.empty((10, 1), dtype=object)
    for fold in range(10):
        sides = np.empty((2, 2), dtype=object)
        sides[0, :] = cells(["0_Name_20_m", "2_Name_22_m"])
        sides[1, :] = cells(["1_Name_21_m", "3_Name_23_m"])
        splits[fold, 0] = {"pairs": sides, "labels": np.array([[1, -1]])}
    savemat(tmp_path / "AgeDB_30.mat", {"splits": splits})
    pairs = pair_lists.load_list(tmp_path / "AgeDB_30.mat", root)
    assert pairs.issame.tolist() == [True, False] * 10
    assert set(colors(pairs)) == {("red", "green")}
    savemat(tmp_path / "other.mat", {"x": np.eye(2)})
    with pytest.raises(ValueError, match="other.mat: not a pair file of AgeDB-30"):
        pair_lists.load_list(tmp_path / "other.mat", root)
    (tmp_path / "text.mat").write_text("no MATLAB")
    with pytest.raises(ValueError, match="text.mat: not a pair file of AgeDB-30"):
        pair_lists.load_list(tmp_path / "text.mat", root)


def test_plain_lists_keep_their_order(faces):
    text = "Ann_A/Ann_A_0001.jpg Bo/Bo_0001.jpg 1\nCy/Cy_0001.png Bo/Bo_0001.jpg 0\n" * 3
    pairs = load(faces, text)
    assert colors(pairs) == [("red", "red"), ("blue", "red")] * 3
    assert pairs.issame.tolist() == [True, False] * 3


def test_absent_images_are_listed_by_line(faces):
    pairs = load(faces, "2\nAnn_A 1 12\nBo 1 2\nBo 1 Cy 1\nBo 2 Cy 2\n")
    assert pairs.issame.tolist() == [True, False] and len(pairs.images) == 4
    assert len(pairs.missing) == 2
    assert "pairs.txt:3: no image Bo_0002" in pairs.missing[0]
    assert "pairs.txt:5: no image Bo_0002 and Cy_0002" in pairs.missing[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("Dee 1 2\nEve 1 2\n", "none of the 2 pairs .* e.g. .*images/Dee/Dee_0001.jpg"),
        ("Ann_A 1 x\n", "pairs.txt:1: 'Ann_A 1 x' is neither"),
        ("Ann_A 1 12\nBo\n", "pairs.txt:2: 'Bo' is neither"),
        ("3\nAnn_A 1 12\nBo 1 Cy 1\n", "2 pairs where its first line announces 6"),
        ("10 300\n", "0 pairs where its first line announces 6000"),
        ("", "no pairs"),
        ("a.jpg 1\nb.jpg 1\nc.jpg 0\n", "3 lines; each pair has two"),
        ("a.jpg 1\nb.jpg 0\n", "pairs.txt:2: the pair of lines 1 and 2 is both same and not"),
        ("a.jpg 1\nb.jpg x\n", "pairs.txt:2: 'b.jpg x' is not 'image number'"),
        ("\x00\x01 \x02 \x03\n", "is neither"),
    ],
)
def test_what_is_no_list(faces, text, message):
    with pytest.raises(ValueError, match=message):
        load(faces, text)


def test_absent_files_say_where_they_are_had(tmp_path):
    for name, where in (("pairs_CALFW.txt", "whdeng.cn/CALFW"), ("pairs.txt", "vis-www.cs.umass")):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such list of pairs; .*{where}"):
            pair_lists.load_list(tmp_path / name, tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="binary.txt is UTF-16 text"):
        pair_lists.load_list(tmp_path / "binary.txt", tmp_path)


def five_lines(points):
    return "\n".join(f"{x:.3f} {y:.3f}" for x, y in points) + "\n"


def pts(points):
    """68 points whose eyes, nose and mouth are the five."""
    whole = np.zeros((68, 2))
    for corners, point in (((36, 39), points[0]), ((42, 45), points[1])):
        whole[corners[0]], whole[corners[1]] = point - [3, 0], point + [3, 0]
    whole[30], whole[48], whole[54] = points[2], points[3], points[4]
    return f"version: 1\nn_points: 68\n{{\n{five_lines(whole)}}}\n"


@pytest.mark.parametrize("form", ["table", "scored", "five", "pts"])
def test_images_are_aligned_by_landmarks(tmp_path, form):
    rng = np.random.default_rng(0)
    root, marks, plain = tmp_path / "images", {}, {}
    for k in range(3):
        plain[k] = official.face(k, 0)
        picture, marks[k] = official.loose(plain[k], rng)
        path = root / f"P{k}" / f"P{k}_0001.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(official.jpeg(picture))
    landmarks = tmp_path / "landmarks"
    if form in ("table", "scored"):
        first = "0.97 " if form == "scored" else ""
        landmarks.write_text("".join(
            f"P{k}/P{k}_0001.jpg {first}{official.points_text(x)}\n" for k, x in marks.items()
        ))  # fmt: skip
    else:
        landmarks.mkdir()
        for k, points in marks.items():
            name = f"P{k}_0001_5loc_attri.txt" if form == "five" else f"P{k}_0001.pts"
            (landmarks / name).write_text(five_lines(points) if form == "five" else pts(points))
    (tmp_path / "pairs.txt").write_text("P0 1 P1 1\nP1 1 P2 1\n")
    pairs = pair_lists.open_set(f"{tmp_path / 'pairs.txt'}:{root}:{landmarks}")
    assert pairs.images.alignment == FIVE_POINTS
    for i in (*pairs.first, *pairs.second):
        k = int(pairs.images.paths[i][1])
        middle = slice(16, 96)
        # Twice through a resampling and once through JPEG.
        error = abs(pairs.images[int(i)].astype(int) - plain[k])[middle, middle].mean()
        assert error < 8, (k, error)


def test_landmarks_that_are_not(tmp_path, faces):
    (tmp_path / "marks.txt").write_text("Bo/Bo_0001.jpg 1 2 3 4 5 6 7 8 9 10\nCy/C.png 1 2 3\n")
    with pytest.raises(ValueError, match="marks.txt: line 2: .* neither five points"):
        read_landmarks(tmp_path / "marks.txt")
    (tmp_path / "some.txt").write_text("Bo/Bo_0001.jpg 1 2 3 4 5 6 7 8 9 10\n")
    with pytest.raises(ValueError, match="no landmarks for 2 of 3 images, the first Ann_A"):
        load(faces, "Ann_A 1 12\nBo 1 Ann_A 1\n", landmarks=tmp_path / "some.txt")
    with pytest.raises(ValueError, match="P.pts|neither five points"):
        (tmp_path / "marks").mkdir()
        (tmp_path / "marks" / "Bo_0001.pts").write_text(five_lines(TEMPLATE[:3]))
        read_landmarks(tmp_path / "marks")["Bo/Bo_0001.jpg"]


def test_the_official_list_and_its_images():
    listed = real("lfw_pairsDevTrain.txt")
    pairs = pair_lists.load_list(listed, REAL / "lfw112")
    lines = [x.split() for x in listed.read_text().splitlines()[1:]]
    present = {path.stem for path in (REAL / "lfw112").glob("*/*.jpg")}

    def there(name, n):
        return f"{name}_{int(n):04d}" in present

    kept = [
        x for x in lines if there(x[0], x[1]) and there(*(x[2:] if len(x) == 4 else (x[0], x[2])))
    ]
    assert len(pairs.issame) == len(kept) > 1000
    same = sum(len(x) == 3 for x in kept)
    assert np.count_nonzero(pairs.issame) == same
    assert len(pairs.missing) == 2200 - len(kept) > 0
    assert "Aaron_Peirsol/Aaron_Peirsol_0001.jpg" in pairs.images.paths
    folds = np.array_split(pairs.issame, 10)
    share = same / len(kept)
    assert all(abs(fold.mean() - share) < 0.02 for fold in folds)
