"""Small things that several tests of the evaluation make."""

import json

import cv2
import numpy as np


def tinted(person, image):
    """A JPEG whose mean colour says who it is."""
    rng = np.random.default_rng([person, image])
    hue = np.uint8([[[(person * 37) % 180, 220, 200]]])
    color = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].astype(float)
    pixels = np.clip(color + rng.normal(0, 10, (112, 112, 3)) + rng.normal(0, 2, 3), 0, 255)
    return cv2.imencode(".jpg", pixels.astype(np.uint8))[1].tobytes()


def run_directory(path, unfinished=""):
    lines = [json.dumps({"step": 0, "verification": {"lfw": {"accuracy_mean": 0.5}}})]
    for step in range(10, 60, 10):
        record = {"step": step, "epoch": 0, "loss": 30.0 / step, "lr": 0.1, "images_per_second": 9}
        lines.append(json.dumps(record))
    lines.append(json.dumps({"step": 50, "verification": {"lfw": {"accuracy_mean": 0.9}}}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + unfinished)
    (path / "config.json").write_text('{"margin": "arcface"}')
    return path
