"""Generated benchmarks in their official formats, small: the real ones may not be passed on.

Faces are drawn by data_tools.synthetic.generate; a loose crop is a face turned, scaled and moved,
with the five points where they went.
"""

import cv2
import numpy as np
from scipy.io import savemat

from data_tools.images.template import TEMPLATE
from data_tools.synthetic import generate


def jpeg(pixels):
    return cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def face(person, image):
    """uint8 RGB [112, 112, 3]."""
    return generate.render(7, person, image)


def loose(pixels, rng):
    """(a larger picture of the face, its five points [5, 2])."""
    angle, scale = rng.uniform(-0.4, 0.4), rng.uniform(0.8, 1.6)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    height, width = rng.integers(170, 240, 2)
    centre = np.array([width, height]) / 2 - turn @ [56, 56]
    matrix = np.column_stack([turn, centre])
    picture = cv2.warpAffine(pixels, matrix, (int(width), int(height)), flags=cv2.INTER_CUBIC)
    return picture, TEMPLATE @ turn.T + centre


def points_text(points):
    return " ".join(f"{value:.3f}" for value in points.ravel())


def ijb(root, name="IJBC", people=24, seed=0):
    """A directory of IJB-B or IJB-C: templates of 1 to 6 faces in stills and videos."""
    rng = np.random.default_rng(seed)
    prefix, galleries = name.lower(), {"IJBC": ("G1", "G2"), "IJBB": ("S1", "S2")}[name]
    crops, meta = root / name / "loose_crop", root / name / "meta"
    crops.mkdir(parents=True)
    meta.mkdir()
    faces, points, template, medium, number = [], [], 100, 0, 0
    owner = {}  # template -> person
    for person in range(people):
        image = 0
        for _ in range(3):
            template += int(rng.integers(1, 4))
            owner[template] = person
            for _ in range(int(rng.integers(1, 4))):
                medium += 1
                for _ in range(int(rng.integers(1, 3))):
                    number, image = number + 1, image + 1
                    picture, five = loose(face(person, image), rng)
                    (crops / f"{number}.jpg").write_bytes(jpeg(picture))
                    faces.append(f"{number}.jpg {template} {medium}")
                    points.append(f"{number}.jpg {points_text(five)} {rng.uniform(0.1, 1):.4f}")
    shuffled = rng.permutation(len(faces))
    (meta / f"{prefix}_face_tid_mid.txt").write_text("".join(f"{faces[i]}\n" for i in shuffled))
    (meta / f"{prefix}_name_5pts_score.txt").write_text("".join(f"{points[i]}\n" for i in shuffled))
    ids = list(owner)
    pairs = [(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
    (meta / f"{prefix}_template_pair_label.txt").write_text(
        "".join(f"{a} {b} {int(owner[a] == owner[b])}\n" for a, b in pairs)
    )
    enrolled = ids[::3]
    for k, gallery in enumerate(galleries):
        rows = [f"{t},{owner[t]},x/{t}.jpg" for t in enrolled[k::2] for _ in range(2)]
        (meta / f"{prefix}_1N_gallery_{gallery}.csv").write_text(
            "\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME", *rows]) + "\n"
        )
    rows = [f"{t},{owner[t]},x/{t}.jpg" for t in ids if t not in enrolled]
    (meta / f"{prefix}_1N_probe_mixed.csv").write_text(
        "\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME", *rows]) + "\n"
    )
    return root


def tinyface(root, people=8, distractors=20):
    """Testing_Set with MATLAB lists of cells, as the official ones are."""
    testing = root / "Testing_Set"
    cells = {}
    for folder in ("Gallery_Match", "Gallery_Distractor", "Probe"):
        (testing / folder).mkdir(parents=True)
    for kind, folder, image in (("gallery", "Gallery_Match", 0), ("probe", "Probe", 1)):
        names = [f"{person}_{image + k}.jpg" for person in range(people) for k in (0, 2)]
        for name in names:
            person, number = name.removesuffix(".jpg").split("_")
            (testing / folder / name).write_bytes(jpeg(face(int(person), int(number))))
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = names
        ids = np.repeat(np.arange(1, people + 1, dtype=np.uint16), 2)[:, None]
        stem = "gallery_match" if kind == "gallery" else "probe"
        savemat(testing / f"{stem}_img_ID_pairs.mat", {f"{kind}_set": cells, f"{kind}_ids": ids})
    for k in range(distractors):
        (testing / "Gallery_Distractor" / f"d{k}.jpg").write_bytes(jpeg(face(1000 + k, 0)))
    return root


def ijbs(root, people=6):
    """The csv lists of IJB-S and aligned faces of its videos and stills."""
    lists, faces = root / "protocol", root / "faces"
    (lists / "galleries").mkdir(parents=True)
    meta, single, booking, surveillance = [], [[], []], [[], []], [[], []]
    probes = []
    for person in range(1, people + 1):
        (faces / f"{person}").mkdir(parents=True)
        side = person % 2
        for still in range(2):
            number = 100 * person + still
            (faces / f"{person}" / f"img_{number}.jpg").write_bytes(jpeg(face(person, still)))
            meta.append(f"{person},img/{number}.jpg,1,2,3,4")
            booking[side].append(f"{person},{person},img/{number}.jpg")
        single[side].append(f"{person},{person},img/{100 * person}.jpg")
        for video in (1, 2):
            name = f"videos/{1000 * video + person}.mp4"
            for frame in range(3):
                file = f"videos_{1000 * video + person}_{frame}.jpg"
                content = jpeg(face(person, 10 * video + frame))
                (faces / f"{person}" / file).write_bytes(content)
                meta.append(f"{person},{name},{frame},2,3,4")
            if video == 1:
                surveillance[side].append(f"{person},{person},{name}")
            else:
                probes.append(name)
    (lists / "cs6_metadata.csv").write_text("\n".join(["SUBJECT_ID,FILENAME,FRAME", *meta]))
    for kind in ("surveillance_to_single-booking", "surveillance_to_surveillance"):
        (lists / f"cs6_{kind}_probe.csv").write_text("\n".join(["FILENAME", *probes]) + "\n")
    for kind, rows in (("single", single), ("booking", booking), ("surveillance", surveillance)):
        for k in (0, 1):
            (lists / "galleries" / f"cs6_surveillance_to_{kind}_g{k + 1}.csv").write_text(
                "\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME", *rows[k]]) + "\n"
            )
    return lists, faces


def rfw(root, people=6):
    """test/data and test/txts of four groups, ten folds of one same and one different pair."""
    rng = np.random.default_rng(3)
    for g, group in enumerate(("African", "Asian", "Caucasian", "Indian")):
        lists = root / "test" / "txts" / group
        lists.mkdir(parents=True)
        marks = []
        for person in range(people):
            folder = root / "test" / "data" / group / f"m.{g}{person}"
            folder.mkdir(parents=True)
            for image in (1, 2, 3):
                picture, five = loose(face(100 * g + person, image), rng)
                file = f"{folder.name}_{image:04d}.jpg"
                (folder / file).write_bytes(jpeg(picture))
                where = f"/test/data/{group}/{folder.name}/{file}"
                marks.append(f"{where}\t{person}\t{points_text(five)}")
        (lists / f"{group}_lmk.txt").write_text("\n".join(marks) + "\n")
        pairs = []
        for fold in range(10):
            a, b = rng.permutation(people)[:2]
            one, other = rng.permutation(3)[:2] + 1
            pairs.append(f"m.{g}{a}\t{one}\t{other}")
            pairs.append(f"m.{g}{a}\t{one}\tm.{g}{b}\t{fold % 3 + 1}")
        (lists / f"{group}_pairs.txt").write_text("\n".join(pairs) + "\n")
    return root
