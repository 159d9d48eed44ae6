"""Draw the quickstart's data set: pictures of coloured shapes, with captions, questions and answers in LLaVA's JSON.

    python scripts/make_shapes.py --out runs/quickstart/data

Objects of one picture differ in colour and in shape, so every question has exactly one right answer. The colour-shape
pairs in HELD_OUT_COMBINATIONS occur in the `unseen` split only. A picture and its questions follow from (seed, split,
index) alone; dataset.json is written last and says that the set is complete. With --reworded, captions choose their
words and the order of the objects at random, as people do: what no picture tells keeps a good model's loss above 0.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

FORMAT = 3  # raise it when the same parameters would give another data set
DRAWS = 8  # tries to find questions that give no other one away
ASKED_ALONE = ("heldout", "unseen")  # splits whose questions are no conversation
COLORS = {
    "red": (222, 28, 36),
    "green": (30, 150, 50),
    "blue": (36, 64, 226),
    "yellow": (244, 216, 24),
    "purple": (158, 40, 190),
    "cyan": (20, 200, 216),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (0.30, 0.33), "large": (0.40, 0.43)}  # side of the bounding box, as a part of the picture's width
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIDES = {"left": (0, 2), "right": (1, 3)}  # which of PLACES lie there
MARGIN = 0.03  # free space around an object within its quarter of the picture
HELD_OUT_COMBINATIONS = (("blue", "circle"), ("green", "square"), ("red", "triangle"), ("yellow", "cross"))
CATEGORIES = ("color", "shape", "count", "side", "yes_no")
PROMPTS = (
    "Provide a brief description of the given image.",
    "Describe the image concisely.",
    "Give a short description of the image.",
    "What is in the image?",
)

WORDINGS = {  # with --reworded, each as good as the others
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "top left": ("at the top left", "in the upper left corner", "above on the left"),
    "top right": ("at the top right", "in the upper right corner", "above on the right"),
    "bottom left": ("at the bottom left", "in the lower left corner", "below on the left"),
    "bottom right": ("at the bottom right", "in the lower right corner", "below on the right"),
}

Color = tuple[int, int, int]
Combination = tuple[str, str]  # (colour, shape)
Scene = tuple[Combination | None, ...]  # what stands at each of PLACES


@dataclass(frozen=True)
class Object:
    """One object; x and y are its centre and side its bounding box, as parts of the picture's width."""

    color: str
    shape: str
    size: str
    place: str
    x: float
    y: float
    side: float
    rgb: Color

    @property
    def combination(self) -> Combination:
        return self.color, self.shape


@dataclass(frozen=True)
class Picture:
    """All that a picture is drawn from; objects are listed in the order of PLACES."""

    objects: tuple[Object, ...]
    background: str
    tones: tuple[Color, Color]
    angle: float
    noise: float
    noise_seed: int
    quality: int

    @property
    def scene(self) -> Scene:
        found = {thing.place: thing.combination for thing in self.objects}
        return tuple(found.get(place) for place in PLACES)


@dataclass(frozen=True)
class Question:
    """One question; the words are what its template is filled with."""

    kind: str  # one of CATEGORIES
    words: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        templates = {
            "color": "What color is the {}?",
            "shape": "Which shape is {}?",
            "count": "How many objects are there?",
            "side": "Which color is on the {}?",
            "yes_no": "Is there a {} {}?",
        }
        return templates[self.kind].format(*self.words)


def answer(question: Question, scene: Scene) -> str:
    """The one right answer; empty where the question cannot be asked (the colour of a circle that is not there)."""
    objects = [combination for combination in scene if combination]
    shape_of = dict(objects)
    color_of = {shape: color for color, shape in objects}
    match question.kind, question.words:
        case "color", (shape,):
            return color_of.get(shape, "")
        case "shape", (color,):
            return shape_of.get(color, "")
        case "count", ():
            return str(len(objects))
        case "side", (side,):
            there = [scene[i] for i in SIDES[side] if scene[i]]
            return there[0][0] if len(there) == 1 else ""
        case "yes_no", combination:
            return "yes" if combination in objects else "no"
    raise ValueError(f"no such kind of question: {question.kind}")


def make_picture(rng: random.Random, count: int, unseen: bool) -> Picture:
    """A random picture of `count` objects, with one held-out combination if `unseen` and none otherwise."""
    first = [rng.choice(HELD_OUT_COMBINATIONS)] if unseen else []
    while True:
        rest = list(zip(rng.sample(list(COLORS), count), rng.sample(SHAPES, count), strict=True))[len(first) :]
        different = all(len({pair[i] for pair in first + rest}) == count for i in (0, 1))
        if different and not set(rest) & set(HELD_OUT_COMBINATIONS):
            break
    light = rng.random() < 0.5
    return Picture(
        objects=place(rng, first + rest),
        background=rng.choice(("plain", "gradient", "stripes")),
        tones=(background_tone(rng, light), background_tone(rng, light)),
        angle=rng.uniform(0, 2 * math.pi),
        noise=rng.uniform(1, 6),
        noise_seed=rng.getrandbits(63),
        quality=rng.randint(60, 95),
    )


def place(rng: random.Random, pairs: list[Combination]) -> tuple[Object, ...]:
    """Give each combination a size and a quarter of the picture, and a place within it."""
    objects = {}
    quarters = rng.sample(range(len(PLACES)), len(pairs))
    while not can_be_placed(quarters):
        quarters = rng.sample(range(len(PLACES)), len(pairs))
    for (color, shape), quarter in zip(pairs, quarters, strict=True):
        size = rng.choice(list(SIZES))
        side = rng.uniform(*SIZES[size])
        least = side / 2 + MARGIN
        x, y = (0.5 * corner + rng.uniform(least, 0.5 - least) for corner in (quarter % 2, quarter // 2))
        rgb = tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in COLORS[color])
        objects[quarter] = Object(color, shape, size, PLACES[quarter], x, y, side, rgb)
    return tuple(objects[quarter] for quarter in sorted(objects))


def can_be_placed(quarters: Sequence[int]) -> bool:
    """Whether objects may stand at these PLACES: two or three so that one side has a single one, to be asked about."""
    alone = any(sum(quarter in side for quarter in quarters) == 1 for side in SIDES.values())
    return alone or len(quarters) == len(PLACES)


def background_tone(rng: random.Random, light: bool) -> Color:
    """A nearly grey tone: no object's colour is one, however light or dark."""
    base = rng.randint(205, 240) if light else rng.randint(20, 60)
    return tuple(base + rng.randint(-10, 10) for _ in range(3))


def draw(picture: Picture, size: int) -> Image.Image:
    """Draw a picture of size x size pixels."""
    down, right = np.mgrid[:size, :size] / size - 0.5
    along = right * math.cos(picture.angle) + down * math.sin(picture.angle)
    first, second = np.array(picture.tones, dtype=np.float64)
    if picture.background == "gradient":
        weight = np.clip(along + 0.5, 0, 1)
    elif picture.background == "stripes":
        weight = 0.5 * (np.sin(along * 50) > 0)
    else:
        weight = np.zeros_like(along)
    pixels = first + weight[..., None] * (second - first)
    for thing in picture.objects:
        cover = coverage(thing, size)[..., None]
        pixels = pixels * (1 - cover) + np.array(thing.rgb) * cover
    pixels = pixels + np.random.default_rng(picture.noise_seed).normal(0, picture.noise, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def coverage(thing: Object, size: int) -> np.ndarray:
    """How much of every pixel an object covers, 0..1; drawn four times as large, for smooth edges."""
    scale = 4 * size
    mask = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(mask)
    half = thing.side / 2
    left, right = (thing.x - half) * scale, (thing.x + half) * scale
    top, bottom = (thing.y - half) * scale, (thing.y + half) * scale
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=255)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=255)
    elif thing.shape == "triangle":
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=255)
    else:
        third = (right - left) / 3
        pen.rectangle((left + third, top, right - third, bottom), fill=255)
        pen.rectangle((left, top + third, right, bottom - third), fill=255)
    return np.asarray(mask.reduce(4), dtype=np.float64) / 255


def make_questions(rng: random.Random, picture: Picture, index: int, split: str) -> list[Question]:
    """Four questions of different categories, in random order.

    The index decides which category is left out and which answer the yes/no question has, so that every run of 60
    pictures is balanced (with four objects, no side has just one: `side` is left out then). In the unseen split they
    ask about the held-out object. Held-out questions are asked alone; those of a conversation must not be answered by
    the turns before them, so some are drawn again, or left out where a picture of few objects has no four such
    questions.
    """
    unseen = split == "unseen"
    left_out = "side" if len(picture.objects) == len(PLACES) else CATEGORIES[index % len(CATEGORIES)]
    categories = [category for category in CATEGORIES if category != left_out]
    best: list[Question] = []
    for _ in range(DRAWS):
        rng.shuffle(categories)
        questions = [make_question(rng, picture, category, index, unseen) for category in categories]
        kept = questions if split in ASKED_ALONE else without_given_away(questions, picture.scene)
        if len(kept) > len(best):
            best = kept
        if len(best) == len(questions):
            break
    return best


def make_question(rng: random.Random, picture: Picture, category: str, index: int, unseen: bool) -> Question:
    """A question of one category; in the unseen split about the held-out object, where there is such a question."""
    held_out = [thing for thing in picture.objects if thing.combination in HELD_OUT_COMBINATIONS]
    subject = rng.choice(held_out or picture.objects)
    if category == "color":
        return Question("color", (subject.shape,))
    if category == "shape":
        return Question("shape", (subject.color,))
    if category == "count":
        return Question("count")
    if category == "side":
        sides = [side for side in SIDES if answer(Question("side", (side,)), picture.scene)]
        about = [side for side in sides if answer(Question("side", (side,)), picture.scene) == subject.color]
        return Question("side", (rng.choice(about or sides),))
    yes = index % 2 == 0
    return Question("yes_no", subject.combination if yes else absent_combination(rng, picture, unseen))


def absent_combination(rng: random.Random, picture: Picture, unseen: bool) -> tuple[str, str]:
    """A combination that the picture lacks; half of the time its colour and its shape are both there, apart.

    Held-out combinations are asked for in the unseen split and nowhere else: a "no" in training would teach them.
    """
    absent = [
        pair
        for pair in product(COLORS, SHAPES)
        if pair not in picture.scene and (pair in HELD_OUT_COMBINATIONS) == unseen
    ]
    colors, shapes = zip(*(thing.combination for thing in picture.objects), strict=True)
    crossed = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    return rng.choice(crossed if crossed and rng.random() < 0.5 else absent)


@cache
def seen_scenes() -> list[Scene]:
    """Every arrangement that can occur outside the unseen split."""
    scenes = []
    for count in (2, 3, 4):
        for colors, shapes in product(permutations(COLORS, count), permutations(SHAPES, count)):
            pairs = list(zip(colors, shapes, strict=True))
            if not set(pairs) & set(HELD_OUT_COMBINATIONS):
                for quarters in filter(can_be_placed, combinations(range(len(PLACES)), count)):
                    found = dict(zip(quarters, pairs, strict=True))
                    scenes.append(tuple(found.get(quarter) for quarter in range(len(PLACES))))
    return scenes


@cache
def possible_answers(question: Question) -> np.ndarray:
    """The question's answer in each of the seen scenes."""
    return np.array([answer(question, scene) for scene in seen_scenes()])


def without_given_away(questions: Iterable[Question], scene: Scene) -> list[Question]:
    """The questions whose answer does not follow, without the picture, from the questions and answers before them."""
    possible = np.ones(len(seen_scenes()), dtype=bool)
    kept = []
    for question in questions:
        answers = possible_answers(question)
        can_be_asked = possible & (answers != "")
        agrees = answers == answer(question, scene)
        if (can_be_asked & ~agrees).any():
            kept.append(question)
            possible = can_be_asked & agrees
    return kept


def make_sample(seed: int, split: str, index: int) -> tuple[Picture, list[Question]]:
    """The picture with this number in a split, and its questions."""
    rng = random.Random(f"{seed}/{split}/{index}")
    picture = make_picture(rng, count=2 + index % 3, unseen=split == "unseen")
    return picture, make_questions(rng, picture, index, split)


def write_sample(job: tuple[str, int], out: Path, seed: int, size: int) -> tuple[Picture, list[Question]]:
    """Make one sample and write its picture below `out`."""
    split, index = job
    picture, questions = make_sample(seed, split, index)
    draw(picture, size).save(out / "images" / image_name(split, index), quality=picture.quality)
    return picture, questions


def image_name(split: str, index: int) -> str:
    return f"{split}/{index:06d}.jpg"


def caption(picture: Picture) -> str:
    """All objects, row by row."""
    parts = [f"a {thing.size} {thing.color} {thing.shape} at the {thing.place}" for thing in picture.objects]
    return ", ".join(parts) + "."


def reworded(rng: random.Random, picture: Picture) -> str:
    """All objects in any order, each in words drawn from WORDINGS."""
    things = rng.sample(picture.objects, len(picture.objects))
    words = [{name: rng.choice(wordings) for name, wordings in WORDINGS.items()} for _ in things]
    parts = [
        f"a {word[thing.size]} {thing.color} {thing.shape} {word[thing.place]}"
        for thing, word in zip(things, words, strict=True)
    ]
    return rng.choice((", ", " and ", "; ")).join(parts) + "."


def pretrain_row(seed: int, split: str, index: int, picture: Picture, in_any_words: bool = False) -> dict:
    """A caption in LLaVA's pretraining format; the marker <image> stands before or after the prompt."""
    rng = random.Random(f"{seed}/{split}/{index}/prompt")
    prompt = rng.choice(PROMPTS)
    text = f"<image>\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n<image>"
    return row(split, index, [text, reworded(rng, picture) if in_any_words else caption(picture)])


def finetune_row(split: str, index: int, picture: Picture, questions: list[Question]) -> dict:
    """A conversation of up to four questions and answers."""
    turns = [text for question in questions for text in (question.text, answer(question, picture.scene))]
    turns[0] = "<image>\n" + turns[0]
    return row(split, index, turns)


def row(split: str, index: int, turns: list[str]) -> dict:
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": f"{split}-{index:06d}", "image": image_name(split, index), "conversations": conversations}


def question_lines(split: str, index: int, picture: Picture, questions: list[Question]) -> list[dict]:
    """One line for each question, as `python -m neva_jax.evaluate` reads them."""
    return [
        {
            "question_id": f"{split}-{index:06d}-{i}",
            "image": image_name(split, index),
            "text": question.text,
            "answer": answer(question, picture.scene),
            "category": question.kind,
        }
        for i, question in enumerate(questions)
    ]


def write_json(path: Path, rows: Iterable[dict], lines: bool = False) -> None:
    """Write rows as a JSON list, or as JSON lines; one row a line either way."""
    texts = [json.dumps(row) for row in rows]
    path.write_text("\n".join(texts) + "\n" if lines else "[\n" + ",\n".join(texts) + "\n]\n")


def write_set(out: Path, seed: int, size: int, counts: dict[str, int], in_any_words: bool) -> None:
    """Draw all pictures and write the JSON files."""
    for split in counts:
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
    (out / "grey" / "heldout").mkdir(parents=True, exist_ok=True)
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    work = partial(write_sample, out=out, seed=seed, size=size)
    with ProcessPoolExecutor(os.cpu_count() or 1) as pool:
        bar = tqdm(pool.map(work, jobs, chunksize=32), total=len(jobs), unit="picture", desc="drawing")
        samples = dict(zip(jobs, bar, strict=True))
    made = {split: [(split, index, *samples[split, index]) for index in range(counts[split])] for split in counts}
    captions = [pretrain_row(seed, split, index, picture, in_any_words) for split, index, picture, _ in made["train"]]
    write_json(out / "pretrain.json", captions)
    write_json(out / "finetune.json", [finetune_row(*sample) for sample in made["train"]])
    write_json(out / "val.json", [finetune_row(*sample) for sample in made["val"]])
    for split in ASKED_ALONE:
        lines = [line for sample in made[split] for line in question_lines(*sample)]
        write_json(out / f"{split}.jsonl", lines, lines=True)
    grey = Image.new("RGB", (size, size), (128, 128, 128))
    for index in range(counts["heldout"]):
        grey.save(out / "grey" / image_name("heldout", index))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and draw; return the exit status."""
    parser = argparse.ArgumentParser(description="Draw pictures of coloured shapes, with captions and questions.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: 64)")
    for split, count in (("train", 6000), ("val", 128), ("heldout", 50), ("unseen", 50)):
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"pictures (default: {count})")
    parser.add_argument("--reworded", action="store_true", help="captions in random words and order (see above)")
    parser.add_argument("--force", action="store_true", help="replace a data set with other parameters")
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in ("train", "val", "heldout", "unseen")}
    wrong = {"size": options.size < 16, **{split: count < 1 for split, count in counts.items()}}
    for name in (name for name, bad in wrong.items() if bad):
        parser.error(f"--{name} {getattr(options, name)}: must be at least {16 if name == 'size' else 1}")

    out: Path = options.out
    stamp = {"format": FORMAT, "seed": options.seed, "size": options.size, "counts": counts}
    if options.reworded:
        stamp["reworded"] = True
    complete, unfinished = out / "dataset.json", out / "unfinished"
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        parser.error(f"--out {out}: is a file, or leads through one; name a folder")
    if complete.is_file() and complete.read_text() == json.dumps(stamp) + "\n":
        print(f"{out}: is complete already")
        return 0
    if out.exists() and not unfinished.exists() and not options.force and any(out.iterdir()):
        parser.error(f"--out {out}: holds other files or another data set; name another folder, or add --force")
    out.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    complete.unlink(missing_ok=True)
    for folder in ("images", "grey"):
        shutil.rmtree(out / folder, ignore_errors=True)
    write_set(out, options.seed, options.size, counts, options.reworded)
    complete.write_text(json.dumps(stamp) + "\n")
    unfinished.unlink()
    print(f"{out}: {sum(counts.values())} pictures ({', '.join(f'{n} {split}' for split, n in counts.items())})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
