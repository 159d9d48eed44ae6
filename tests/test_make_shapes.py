"""scripts/make_shapes.py: its answers, splits and pictures against the objects' coordinates, and a data set on disk."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neva_jax.data.rows import parse_row
from neva_jax.data.stores import FolderStore
from neva_jax.inference.questions import read_questions

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_shapes.py"
SPLITS = ("train", "val", "heldout", "unseen")
HELD_OUT = {("blue", "circle"), ("green", "square"), ("red", "triangle"), ("yellow", "cross")}
SEED = 5
COUNT = 60  # numbers of pictures and categories, 2 and 4, repeat after it
COUNTS = {"train": 12, "val": 4, "heldout": 4, "unseen": 4}
FLAGS = ["--seed", str(SEED), "--size", "32", *(word for split in SPLITS for word in (f"--{split}", COUNTS[split]))]


def load():
    spec = importlib.util.spec_from_file_location("make_shapes_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shapes = load()


@cache
def samples(split):
    return [shapes.make_sample(SEED, split, index) for index in range(COUNT)]


def facts(picture):
    """What is there, by coordinates: (colour, shape, left or right, top or bottom)."""
    return tuple(
        (thing.color, thing.shape, "left" if thing.x < 0.5 else "right", "top" if thing.y < 0.5 else "bottom")
        for thing in picture.objects
    )


def right_answers(text, objects):
    """Every answer that holds for these facts; one, if the question is a good one."""
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        return [color for color, shape, *_ in objects if shape == match[1]]
    if match := re.fullmatch(r"Which color is on the (left|right)\?", text):
        return [color for color, _, *sides in objects if match[1] in sides]
    if match := re.fullmatch(r"Which shape is (\w+)\?", text):
        return [shape for color, shape, *_ in objects if color == match[1]]
    if text == "How many objects are there?":
        return [str(len(objects))]
    match = re.fullmatch(r"Is there a (\w+) (\w+)\?", text)
    return ["yes" if any(thing[:2] == match.groups() for thing in objects) else "no"]


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_the_one_answer_that_the_coordinates_give(split):
    for picture, questions in samples(split):
        for question in questions:
            answer = shapes.answer(question, picture.scene)
            assert right_answers(question.text, facts(picture)) == [answer], question.text


@pytest.mark.parametrize("split", SPLITS)
def test_objects_differ_in_colour_and_in_shape_and_lie_in_quarters_of_their_own(split):
    for index, (picture, _) in enumerate(samples(split)):
        objects = facts(picture)
        assert len(objects) == 2 + index % 3
        assert len({color for color, *_ in objects}) == len({shape for _, shape, *_ in objects}) == len(objects)
        assert len({thing[2:] for thing in objects}) == len(objects)
        for thing in picture.objects:
            for centre in (thing.x, thing.y):
                quarter = 0.5 * (centre > 0.5)
                assert quarter < centre - thing.side / 2
                assert centre + thing.side / 2 < quarter + 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_combinations_are_in_every_unseen_picture_and_nowhere_else(split):
    for picture, questions in samples(split):
        found = HELD_OUT & {(color, shape) for color, shape, *_ in facts(picture)}
        asked = HELD_OUT & {question.words for question in questions if question.kind == "yes_no"}
        assert len(found) == (split == "unseen")
        assert split == "unseen" or not asked


def test_unseen_questions_are_about_the_held_out_object():
    about = Counter()
    for picture, questions in samples("unseen"):
        ((color, shape, side, _),) = [thing for thing in facts(picture) if thing[:2] in HELD_OUT]
        for question in questions:
            if question.kind == "color":
                assert question.words == (shape,)
            elif question.kind == "shape":
                assert question.words == (color,)
            elif question.kind == "yes_no":
                assert question.words in HELD_OUT
            elif question.kind == "side" and right_answers(f"Which color is on the {side}?", facts(picture)) == [color]:
                assert shapes.answer(question, picture.scene) == color
            about[question.kind] += 1
    assert set(about) == {"color", "shape", "yes_no", "side", "count"}


@pytest.mark.parametrize("split", ["heldout", "unseen"])
def test_scored_questions_are_four_of_different_categories_and_yes_is_right_as_often_as_no(split):
    said = Counter()
    for picture, questions in samples(split):
        categories = {question.kind for question in questions}
        assert len(questions) == len(categories) == 4
        assert categories <= {"color", "shape", "count", "side", "yes_no"}
        said.update(shapes.answer(q, picture.scene) for q in questions if q.kind == "yes_no")
    assert said["yes"] == said["no"] > 20


@cache
def worlds():
    """The facts of every picture that training may show."""
    colors, kinds = ("red", "green", "blue", "yellow", "purple", "cyan"), ("circle", "square", "triangle", "cross")
    quarters = list(product(("left", "right"), ("top", "bottom")))
    return [
        tuple((color, kind, *quarter) for (color, kind), quarter in zip(pairs, chosen, strict=True))
        for count in (2, 3, 4)
        for chosen in combinations(quarters, count)
        if count == 4 or any(sum(side in quarter for quarter in chosen) == 1 for side in ("left", "right"))
        for some in permutations(kinds, count)
        for pairs in (tuple(zip(picked, some, strict=True)) for picked in permutations(colors, count))
        if not HELD_OUT & set(pairs)
    ]


def test_no_question_of_a_conversation_is_answered_by_the_text_before_it():
    asked = Counter()
    for picture, questions in [sample for split in ("train", "val") for sample in samples(split)[:12]]:
        possible = worlds()
        assert 1 <= len(questions) <= 4
        for question in questions:
            answers = [right_answers(question.text, world) for world in possible]
            assert len({answer[0] for answer in answers if len(answer) == 1}) > 1, question.text
            right = right_answers(question.text, facts(picture))
            possible = [world for world, answer in zip(possible, answers, strict=True) if answer == right]
        asked[len(questions)] += 1
    assert asked[4] > 12


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_captions_name_every_object_with_its_size_and_place(split):
    for picture, _ in samples(split):
        parts = [
            f"a {'small' if thing.side < 0.365 else 'large'} {color} {shape} at the {across} {along}"
            for thing, (color, shape, along, across) in zip(picture.objects, facts(picture), strict=True)
        ]
        assert shapes.caption(picture) == ", ".join(parts) + "."


def test_reworded_captions_tell_the_same_in_any_words_and_order():
    sizes = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
    seen, orders = Counter(), set()
    for index, (picture, _) in enumerate(samples("train")):
        text = shapes.pretrain_row(SEED, "train", index, picture, in_any_words=True)["conversations"][1]["value"]
        told = []
        for part in re.split(r", | and |; ", text.removesuffix(".")):
            size, color, shape, where = re.fullmatch(r"a (\w+) (\w+) (\w+) (.+)", part).groups()
            top, left = ("top" in where or "upper" in where or "above" in where), "left" in where
            place = f"{'top' if top else 'bottom'} {'left' if left else 'right'}"
            assert where in shapes.WORDINGS[place]
            told.append((sizes[size], color, shape, place))
            seen.update((size, where))
        objects = [(thing.size, thing.color, thing.shape, thing.place) for thing in picture.objects]
        assert sorted(told) == sorted(objects)
        orders.add(told == objects)
    assert set(seen) == {wording for wordings in shapes.WORDINGS.values() for wording in wordings}
    assert orders == {True, False}


@pytest.mark.parametrize("size", [32, 64])
def test_a_picture_shows_each_object_in_its_colour(size):
    named = {name: np.array(rgb) for name, rgb in shapes.COLORS.items()}
    for picture, _ in samples("train")[:15] + samples("unseen")[:15]:
        pixels = np.asarray(shapes.draw(picture, size), np.float64)
        assert pixels.shape == (size, size, 3)
        for thing in picture.objects:
            x, y = int(thing.x * size), int(thing.y * size)
            seen = pixels[y - 1 : y + 1, x - 1 : x + 1].mean(axis=(0, 1))
            np.testing.assert_allclose(seen, thing.rgb, atol=4 * picture.noise / 2 + 1)
            assert min(named, key=lambda name: np.abs(named[name] - seen).sum()) == thing.color
        covered = sum(shapes.coverage(thing, size) for thing in picture.objects)
        ground = pixels[covered == 0]
        assert np.ptp(ground, axis=-1).mean() < 25 < min(np.ptp(rgb) for rgb in named.values())


@pytest.mark.parametrize(
    ("shape", "part"), [("circle", math.pi / 4), ("square", 1), ("triangle", 0.5), ("cross", 5 / 9)]
)
def test_a_shape_covers_what_its_formula_says(shape, part):
    found = [thing for picture, _ in samples("train") for thing in picture.objects if thing.shape == shape]
    assert len(found) > 10
    for thing in found:
        cover = shapes.coverage(thing, 64) / 64**2
        assert cover.sum() == pytest.approx(part * thing.side**2, rel=0.08)
        rows, columns = np.mgrid[:64, :64] / 64
        assert (cover * columns).sum() / cover.sum() == pytest.approx(thing.x, abs=0.02)
        middle = thing.y + (thing.side / 6 if shape == "triangle" else 0)  # a triangle's mass lies low
        assert (cover * rows).sum() / cover.sum() == pytest.approx(middle, abs=0.02)


def test_a_sample_follows_from_seed_split_and_index():
    for split in SPLITS:
        picture, questions = samples(split)[7]
        assert shapes.make_sample(SEED, split, 7) == (picture, questions)
        np.testing.assert_array_equal(shapes.draw(picture, 32), shapes.draw(picture, 32))
        for other in ((SEED + 1, split, 7), (SEED, split, 10), (SEED, SPLITS[split == "train"], 7)):
            assert shapes.make_sample(*other)[0].objects != picture.objects


# --- a data set ------------------------------------------------------------------------------------------------------


def make(*flags):
    """Runs the script in a process of its own: it forks workers, which a process with JAX's threads must not."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A complete data set. Do not change it."""
    out = tmp_path_factory.mktemp("shapes") / "data"
    status, printed, _ = make("--out", out, *FLAGS)
    assert status == 0
    assert printed == f"{out}: 24 pictures (12 train, 4 val, 4 heldout, 4 unseen)\n"
    return out


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_of_a_data_set(data):
    texts = {"dataset.json", "pretrain.json", "finetune.json", "val.json", "heldout.jsonl", "unseen.jsonl"}
    pictures = {f"images/{split}/{i:06d}.jpg" for split in SPLITS for i in range(COUNTS[split])}
    assert set(files(data)) == texts | pictures | {f"grey/heldout/{i:06d}.jpg" for i in range(4)}


@pytest.mark.parametrize(("name", "split"), [("pretrain", "train"), ("finetune", "train"), ("val", "val")])
def test_rows_are_good_and_say_what_the_pictures_show(name, split, data):
    rows = [parse_row(raw) for raw in json.loads((data / f"{name}.json").read_text())]
    assert len(rows) == len({row.id for row in rows}) == COUNTS[split]
    for row, (picture, questions) in zip(rows, samples(split), strict=False):
        pairs = list(zip(row.turns[::2], row.turns[1::2], strict=True))
        if name == "pretrain":
            ((asked, said),) = pairs
            assert said.text == shapes.caption(picture)
            assert asked.text.replace("<image>", "").strip() in shapes.PROMPTS
            continue
        assert len(pairs) == len(questions)
        assert row.turns[0].text.startswith("<image>\n")
        for asked, said in pairs:
            assert right_answers(asked.text.removeprefix("<image>\n"), facts(picture)) == [said.text]
    if name == "pretrain":
        assert {row.turns[0].text.startswith("<image>") for row in rows} == {True, False}


@pytest.mark.parametrize("split", ["heldout", "unseen"])
def test_question_files_are_read_by_evaluate(split, data):
    questions = read_questions(data / f"{split}.jsonl")
    assert len(questions) == 4 * COUNTS[split]
    for i, question in enumerate(questions):
        (name,) = question.images
        assert name == f"{split}/{i // 4:06d}.jpg"
        assert right_answers(question.text, facts(samples(split)[i // 4][0])) == [question.raw["answer"]]
        assert question.raw["category"] in ("color", "shape", "count", "side", "yes_no")
        for folder in ("images", "grey") if split == "heldout" else ("images",):
            assert FolderStore(data / folder).read(name)


@pytest.mark.parametrize("split", SPLITS)
def test_image_files_show_the_objects(split, data):
    named = {name: np.array(rgb) for name, rgb in shapes.COLORS.items()}
    for index in range(COUNTS[split]):
        with Image.open(data / "images" / split / f"{index:06d}.jpg") as image:
            pixels = np.asarray(image, float)
        for thing in samples(split)[index][0].objects:
            x, y = int(thing.x * 32), int(thing.y * 32)
            seen = pixels[y - 1 : y + 1, x - 1 : x + 1].mean(axis=(0, 1))
            assert min(named, key=lambda name: np.abs(named[name] - seen).sum()) == thing.color


def test_grey_images_are_one_grey(data):
    for path in (data / "grey" / "heldout").iterdir():
        with Image.open(path) as image:
            assert image.size == (32, 32)
            assert image.convert("RGB").getcolors() == [(32 * 32, (128, 128, 128))]


def test_a_complete_data_set_is_left_alone(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert make("--out", data, *FLAGS) == (0, f"{data}: is complete already\n", "")
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_broken_off_data_set_is_made_again_the_same(data, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(data, out)
    (out / "dataset.json").unlink()
    (out / "unfinished").touch()
    (out / "images" / "train" / "000003.jpg").write_bytes(b"cut")
    (out / "images" / "train" / "000099.jpg").write_bytes(b"of other parameters")
    assert make("--out", out, *FLAGS)[0] == 0
    assert files(out) == files(data)


def refused(capsys, *flags):
    """The last line of stderr; the status is 2."""
    with pytest.raises(SystemExit) as ended:
        shapes.main([str(flag) for flag in flags])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_text("mine")
    assert f"--out {tmp_path}: holds other files" in refused(capsys, "--out", tmp_path, *FLAGS)
    assert files(tmp_path) == {"images/mine.jpg": b"mine"}


@pytest.mark.parametrize("changed", [["--seed", 6], ["--size", 33], ["--train", 13], ["--unseen", 3]])
def test_another_data_set_is_refused_without_force(changed, data, capsys):
    before = files(data)
    assert "--force" in refused(capsys, "--out", data, *FLAGS, *changed)
    assert files(data) == before


def test_force_replaces_another_data_set(data, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(data, out)
    few = [word for split in SPLITS for word in (f"--{split}", 1)]
    assert make("--out", out, "--size", 16, "--seed", SEED, "--force", *few)[0] == 0
    left = files(out)
    assert sum(name.startswith("images/") for name in left) == 4
    assert json.loads(left["dataset.json"])["size"] == 16
    # The same pictures: they do not depend on how many there are, or on their size.
    assert json.loads(left["finetune.json"]) == json.loads(files(data)["finetune.json"])[:1]


@pytest.mark.parametrize(("flag", "value", "least"), [("--size", 15, 16), ("--train", 0, 1), ("--heldout", -1, 1)])
def test_numbers_that_are_too_small(flag, value, least, tmp_path, capsys):
    text = refused(capsys, "--out", tmp_path / "new", flag, value)
    assert f"{flag} {value}: must be at least {least}" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["a file", "a broken stamp"])
def test_an_output_that_is_no_data_set(content, tmp_path, capsys):
    out = tmp_path / "out"
    if content == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "dataset.json").write_text("{")
    assert f"--out {out}" in refused(capsys, "--out", out, *FLAGS)
