"""Recipes and overrides: what is taken, what is refused, and how the error reads."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import textwrap

import numpy as np
import pytest
import torch

from data_tools.common.errors import UserError
from recognition import config
from recognition.backbones import make_backbone
from recognition.losses import MARGINS, make_margin

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "configs").glob("*.py"))


@pytest.fixture
def recipe(tmp_path):
    def write(body):
        path = tmp_path / "my_recipe.py"
        head = "from easydict import EasyDict as edict\nconfig = edict()\n"
        path.write_text(head + textwrap.dedent(body))
        return str(path)

    return write


def test_deltas_over_defaults(recipe):
    cfg = config.load(recipe('config.rec = "d"\nconfig.lr = 1\nconfig.val_targets = ["lfw"]'))
    assert (cfg.rec, cfg.lr, cfg.val_targets, cfg.momentum) == ("d", 1.0, ["lfw"], 0.9)
    assert cfg.output == "runs/my_recipe"


@pytest.mark.parametrize(
    "typed, key, value",
    [
        ("lr=0.5", "lr", 0.5),
        ("network=mbf", "network", "mbf"),
        ("sync_bn=true", "sync_bn", True),
        ("sync_bn=False", "sync_bn", False),
        ("resume=none", "resume", None),
        ("resume=False", "resume", None),
        ("clip_norm=none", "clip_norm", None),
        ("val_targets=lfw,cfp_fp", "val_targets", ["lfw", "cfp_fp"]),
        ("val_targets=['lfw']", "val_targets", ["lfw"]),
        ("val_targets=", "val_targets", []),
        ("rec=/a=b", "rec", "/a=b"),
        ("output=2024", "output", "2024"),
    ],
)
def test_overrides(recipe, typed, key, value):
    assert getattr(config.load(recipe('config.rec = "d"'), [typed]), key) == value


@pytest.mark.parametrize(
    "typed, error, words",
    [
        ("sample_rat=0.1", KeyError, "did you mean sample_rate"),
        ("lr=fast", TypeError, "lr='fast' is str: expected float"),
        ("lr=nan", TypeError, "lr='nan'"),
        ("sample_rate=1.5", ValueError, "0 to 1"),
        ("batch_size=0", ValueError, "at least 1"),
        ("batch_size=2.5", TypeError, "expected int"),
        ("batch_size=true", TypeError, "expected int"),
        ("optimizer=lamb", ValueError, "one of sgd, adamw"),
        ("precision=int8", ValueError, "fp64"),
        ("lr", ValueError, "not key=value"),
        ("num_epoch=3", KeyError, "num_epochs"),
        ("fp16=True", KeyError, 'precision="fp16"'),
        ("verbose=2000", KeyError, "verify_every"),
        ("dali=True", KeyError, '"cpu" or "dali"'),
        ("output=True", TypeError, "expected str"),
        ("clip_norm=0", ValueError, "none for off"),
        ("margin_list=(1,2)", ValueError, r"expected \(m1, m2, m3\)"),
    ],
)
def test_what_is_refused(recipe, typed, error, words):
    with pytest.raises(error, match=words):
        config.load(recipe('config.rec = "d"'), [typed])


def test_the_last_of_a_key_typed_twice_holds(recipe):
    assert config.load(recipe('config.rec = "d"'), ["lr=1", "lr=2"]).lr == 2.0


@pytest.mark.parametrize(
    "first, second", [("batch_size", "global_batch_size"), ("max_steps", "num_epochs")]
)
def test_alternatives(recipe, first, second):
    both = f'config.rec = "d"\nconfig.{first} = 8\nconfig.{second} = 16'
    with pytest.raises(ValueError, match=f"both {first} and {second}"):
        config.load(recipe(both))
    with pytest.raises(ValueError, match="command line"):
        config.load(recipe('config.rec = "d"'), [f"{first}=8", f"{second}=16"])
    cfg = config.load(recipe(f'config.rec = "d"\nconfig.{first} = 8'), [f"{second}=16"])
    assert getattr(cfg, first) is None and getattr(cfg, second) == 16


def test_batch_and_steps():
    base = {"rec": "d"}
    assert config.make(base).global_batch(4) == 512
    assert config.make(base | {"batch_size": 32, "accumulation": 3}).global_batch(4) == 384
    assert config.make(base | {"global_batch_size": 100}).global_batch(8) == 100
    assert config.make(base | {"batch_size": 10, "num_epochs": 3}).total_steps(25, 1) == 8
    assert config.make(base | {"max_steps": 7}).total_steps(25, 1) == 7


def test_margin_list_of_arcface_torch(recipe):
    cfg = config.load(recipe('config.rec = "d"\nconfig.margin_list = (1.0, 0.5, 0.0)'))
    assert cfg.margin == "combined"
    assert cfg.margin_args == {"m1": 1.0, "m2": 0.5, "m3": 0.0}
    with pytest.raises(ValueError, match="keep one"):
        config.load(
            recipe('config.rec = "d"\nconfig.margin = "arcface"\nconfig.margin_list = (1, 0, 0)')
        )


def test_single_margin_arguments_from_the_command_line(recipe):
    body = 'config.rec = "d"\nconfig.margin = "arcface"\nconfig.margin_args = {"scale": 32.0}'
    cfg = config.load(recipe(body), ["margin_args.margin=0.3"])
    assert cfg.margin_args == {"scale": 32.0, "margin": 0.3}
    assert config.load(recipe(body), ["margin=cosface"]).margin_args == {}


def test_missing_recipe_and_missing_rec(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe"):
        config.load(str(tmp_path / "absent.py"))
    with pytest.raises(KeyError, match="rec is missing"):
        config.load(recipe(""))
    for body in ("config = (", "import no_such_module", "1 / 0"):
        (tmp_path / "broken.py").write_text(body)
        with pytest.raises(ValueError, match="broken.py does not run"):
            config.load(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(TypeError, match="defines no `config`"):
        config.load(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    "name, arguments, error, words",
    [
        ("arcfase", {}, KeyError, "did you mean arcface"),
        ("ArcFace", {}, KeyError, "did you mean arcface"),
        (None, {}, KeyError, "one of softmax"),
        ("arcface", None, TypeError, "expected arguments by name"),
        ("arcface", {1: 2}, KeyError, "margin_args.1: arcface takes"),
        ("arcface", {"scale": 10**400}, ValueError, "margin=arcface"),
        ("magface", {"l_m": 0.8, "u_m": 0.45}, ValueError, "l_m <= u_m"),
        ("jamsface", {"angular_bound": 0}, ValueError, "between 0 and angular_bound=0"),
        ("circle", {"gamma": 0}, ValueError, "gamma=0"),
        ("triplet", {}, KeyError, "one of softmax, arcface"),
        ("arcface", {"margn": 0.5}, KeyError, "did you mean margin"),
        ("arcface", {"margin": "0.5"}, TypeError, "expected a number"),
        ("arcface", {"margin": True}, TypeError, "expected a number"),
        ("arcface", {"margin": 4.0}, ValueError, "margin=arcface with .*0 <= margin < pi"),
        ("arcface", {"scale": -1.0}, ValueError, "positive"),
        ("arcface", {"gradient": "exakt"}, ValueError, "one of exact, straight_through"),
        ("sphereface", {"overflow": "fallback"}, ValueError, "m1=1 only"),
        ("cosface", {"interclass_filtering_threshold": 2.0}, ValueError, "cosine"),
    ],
)
def test_margin_arguments_are_checked(name, arguments, error, words):
    with pytest.raises(error, match=words):
        make_margin(name, arguments)


def test_margin_arguments_as_they_are_typed():
    """The command line reads `none` as None; numbers may be NumPy's."""
    assert make_margin("magface", {"overflow": None}).overflow == "none"
    assert make_margin("adacos", {"scale": None}).scale.isnan()  # chosen by the head
    assert make_margin("arcface", {"scale": np.float32(32)}).scale == 32
    assert make_margin("arcface").scale == 64


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    cfg = config.load(str(path), ["rec=somewhere"])
    assert cfg.margin in MARGINS
    make_margin(cfg.margin, cfg.margin_args)
    with torch.device("meta"):
        make_backbone(cfg.network, cfg.embedding_size, cfg.network_args)


def test_arguments_of_the_network_are_typed_one_by_one_and_leave_with_it(recipe):
    path = recipe(
        'config.rec = "d"\nconfig.network = "vit_t"\nconfig.network_args = {"drop_path": 0.1}'
    )
    cfg = config.load(path, ["network_args.mask_ratio=0.05"])
    assert cfg.network_args == {"drop_path": 0.1, "mask_ratio": 0.05}
    assert config.load(path, ["network=r50"]).network_args == {}


def test_every_key_is_read_somewhere():
    methods = inspect.getsource(config.Config.global_batch)
    methods += inspect.getsource(config.Config.total_steps)
    code = methods.replace("self.", "cfg.") + "".join(
        path.read_text()
        for path in [*(ROOT / "recognition").rglob("*.py"), ROOT / "launch" / "train.py"]
        if path.name != "config.py"
    )
    for field in dataclasses.fields(config.Config):
        assert re.search(rf"cfg\.{field.name}\b", code), f"nobody reads {field.name}"


def test_several_data_sets_are_a_list_typed_or_written():
    assert config.make({"rec": "a"}).recs == ["a"]
    assert config.make({"rec": ["a"]}).rec == "a"
    several = config.make({"rec": ["a", "b"], "rec_shares": [2, 1]})
    assert several.recs == ["a", "b"] and several.rec_shares == [2, 1]
    for empty in ([], ""):
        with pytest.raises(KeyError, match="rec is missing"):
            config.make({"rec": empty})
    with pytest.raises(TypeError, match="expected str"):
        config.make({"rec": [["a"]]})


@pytest.mark.parametrize(
    "body, words",
    [
        (
            "config.rec = 'd'\nconfig.lr = 1 / 0",
            "my_recipe.py does not run: line 4 (`config.lr = 1 / 0`): Zero",
        ),
        ("import nothing_of_this_name", "line 3 (`import nothing_of_this_name`): ModuleNotFound"),
        ("config.lr = (", "my_recipe.py does not run: line 3: SyntaxError: "),
    ],
    ids=["exception", "import", "syntax"],
)
def test_an_error_of_a_recipe_names_file_and_line(recipe, body, words):
    with pytest.raises(UserError) as raised:
        config.load(recipe(body))
    assert words in str(raised.value)


@pytest.mark.parametrize("content", [b"{", b"[1", b"\xff\xfe{", b"\x80"], ids=repr)
def test_a_json_recipe_that_is_none_is_a_users_error(tmp_path, content):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        config.load(str(path))


def test_the_counts_of_a_recipe_are_those_of_its_own_data(tmp_path):
    """Another rec= on the command line has its own."""
    recipe = "launch/configs/ms1mv2_r50_arcface.py"
    own = config.load(recipe)
    assert (own.num_classes, own.num_image) == (85_742, 5_822_653)
    other = config.load(recipe, [f"rec={tmp_path}"])
    assert (other.num_classes, other.num_image) == (None, None)
    typed = config.load(recipe, [f"rec={tmp_path}", "num_classes=7"])
    assert (typed.num_classes, typed.num_image) == (7, None)
