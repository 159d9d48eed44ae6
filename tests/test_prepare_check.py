"""prepare check and lengths: from flags to what is printed and written, exit status, and rows that mean harm."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from neva_jax.data.plans import Plans
from neva_jax.data.sources import Sources
from neva_jax.errors import UserError
from neva_jax.prepare import main
from tests.data.damaged import EXPECTED, NEEDS_DECODING, ROWS, write_damaged
from tests.data.rows import conversation

FILES = {"report.json", "report.html", "problems.jsonl", "lengths.png"}


def prepare(command, *arguments):
    return main([command, *map(str, arguments)])


@pytest.fixture
def damaged(tmp_path, tokenizer_path):
    """The flags for the damaged folder; its sizes are those of the tests' tiny model."""
    path = write_damaged(tmp_path)
    return [
        *("--json", path, "--images", tmp_path / "images", "--tokenizer", tokenizer_path, "--max-length", 192),
        *(
            "--workers",
            0,
            "model.vision.image_size=32",
            "model.vision.patch_size=8",
            f"data.cache={tmp_path / 'cache'}",
        ),
    ]


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_prints_and_writes_the_same_and_ends_with_2(damaged, tmp_path, capsys):
    out = tmp_path / "report"
    assert prepare("check", "--decode", "--out", out, *damaged) == 2
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads((out / "report.json").read_text())
    assert report["problems"] == len(EXPECTED)
    lines = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    assert {line["row"]: line["kind"] for line in lines} == EXPECTED
    assert f"{len(EXPECTED)} of {len(ROWS)} rows are bad" in printed.splitlines()
    page = Text.of((out / "report.html").read_text())
    for kind, one in report["bad"].items():
        assert re.search(rf"^  {kind} +{one['rows']}  {re.escape(one['meaning'])}$", printed, re.MULTILINE)
        for example in one["examples"]:
            assert example["message"] in printed
            assert example["message"] in page
    with Image.open(out / "lengths.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 800


def test_check_of_good_rows_ends_with_0(llava_data, tokenizer_path, capsys):
    flags = ["--json", llava_data.json, "--images", llava_data.images, "--tokenizer", tokenizer_path, "--workers", "0"]
    assert prepare("check", *flags, "--decode") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problems in 25 rows"


def test_duplicates_and_dropped_rows_are_no_problems(damaged, tmp_path, capsys):
    path = tmp_path / "warn.json"
    rows = [ROWS[0][0], ROWS[21][0], next(row for row, kind in ROWS if kind == "too_long")]
    path.write_text(json.dumps(rows))
    assert prepare("check", *damaged, "data.on_long_row=drop", "--json", path, "--decode") == 0
    printed = capsys.readouterr().out
    assert "too_long  1" in printed
    assert "'good': " in printed


def test_check_without_a_tokenizer(damaged, tmp_path, capsys):
    flags = [*damaged]
    at = flags.index("--tokenizer")
    del flags[at : at + 2]
    assert prepare("check", "--out", tmp_path / "report", *flags) == 2
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES - {"lengths.png"}
    assert "Tokens" not in capsys.readouterr().out
    with pytest.raises(UserError, match="--show and --row need --tokenizer"):
        prepare("check", "--show", "1", *flags)


def test_check_of_a_configuration_looks_at_training_and_validation(llava_data, small_overrides, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: {max_length: 100}\n")
    assert prepare("check", "--config", config, *small_overrides, "--out", tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [one["file"] for one in report["files"]] == [str(llava_data.json), str(llava_data.val_json)]
    assert [one["rows"] for one in report["files"]] == [25, 8]
    same = [*small_overrides, f"data.val=[{{json: {llava_data.json}, images: {llava_data.images}, weight: 0.001}}]"]
    assert prepare("check", *same) == 0
    assert "no problems in 25 rows" in capsys.readouterr().out


def test_shown_samples_come_first(damaged, capsys):
    assert prepare("check", "--show", "2", "--row", "1", "--row", "0:11", *damaged) == 2
    printed = capsys.readouterr().out
    shown = re.findall(r"^--- .*: row (\d+)", printed, re.MULTILINE)
    assert shown == ["0", "13", "1", "11"]
    assert "ASSISTANT:⟦ A circle.</s>⟧ USER: Sure? ASSISTANT:⟦ Yes.</s>⟧" in printed
    assert "ASSISTANT:⟦ Two.</s>⟧" in printed
    assert "bad: field image: absent.jpg is not in" in printed
    assert "\x1b" not in printed
    prepare("check", "--row", "1", "--color", "always", *damaged)
    assert "\x1b[1m\x1b[32m Two.\x1b[0m\x1b[1m\x1b[32m</s>\x1b[0m" in capsys.readouterr().out


def test_what_is_in_out_stays_unless_forced(damaged, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*report: exists; name another folder, or add --force"):
        prepare("check", "--out", out, *damaged)
    assert (out / "mine.txt").read_text() == "mine"
    assert prepare("check", "--out", out, "--force", *damaged) == 2
    assert {path.name for path in out.iterdir()} == FILES
    with pytest.raises(UserError, match="contains what is read"):
        prepare("check", "--out", tmp_path, "--force", *damaged)
    with pytest.raises(UserError, match="is the folder that is read; name another"):
        prepare("check", "--out", tmp_path / "rows.json", "--force", *damaged)


def test_nothing_is_left_of_a_report_that_could_not_be_written(damaged, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neva_jax.data.report_pages.draw_lengths", full)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"):
        prepare("check", "--out", tmp_path / "report", *damaged)
    assert not list(tmp_path.glob("*report*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --config, or --json and --images"),
        (["--images", "x"], "give either --json"),
        (["--json", "a", "--records", "b"], "give either --json"),
        (["--records", "b", "--images", "c"], "--images is for --json"),
        (["--json", "absent.json"], "absent.json: cannot be read"),
        (["--json", "FILE", "--tokenizer", "absent.model"], "absent.model: cannot be read"),
        (["--json", "FILE", "--template", "v9"], "data.template"),
        (["--json", "FILE", "--max-length", "many"], "data.max_length"),
        (["--json", "FILE", "--max-length", "16"], "data.max_length=16 leaves no room for text"),
        (["--json", "FILE", "--workers", "-1"], "data.workers=-1 must not be negative"),
        (["--json", "FILE", "data.max_lenght=3"], "unknown key data.max_lenght; did you mean data.max_length"),
        (["--json", "FILE", "--show", "-1"], "--show -1: must not be negative"),
        (["--json", "FILE", "--tokenizer", "TOKENIZER", "--row", "99"], "--row 99: there is no row 99"),
        (["--json", "FILE", "--tokenizer", "TOKENIZER", "--row", "1:0"], "--row 1:0: there is no source 1"),
        (["--json", "FILE", "--tokenizer", "TOKENIZER", "--row", "x"], "--row x: must be a row number"),
        (["--config", "absent.yaml"], "--config absent.yaml: cannot be read"),
    ],
)
def test_wrong_usage(llava_data, tokenizer_path, flags, message):
    names = {"FILE": str(llava_data.json), "TOKENIZER": str(tokenizer_path)}
    with pytest.raises(UserError) as error:
        prepare("check", *(names.get(flag, flag) for flag in flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_number_of_workers_does_not_change_a_byte(damaged, tmp_path, monkeypatch):
    monkeypatch.setattr("neva_jax.data.inspection.ROWS", 7)
    monkeypatch.setattr("neva_jax.data.inspection.usable_cores", lambda: 2)
    written = []
    for workers in (0, 2):
        out = tmp_path / f"report-{workers}"
        prepare("check", "--decode", *damaged, "--workers", workers, "--out", out)
        written.append({path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"})
    assert written[0] == written[1]


# --- rows that mean harm ---------------------------------------------------------------------------------------------

SCRIPT = "</code></table><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\ud83d\r"


TAGS = {"html", "meta", "title", "style", "h1", "h2", "h3", "table", "tr", "th", "td", "ul", "li", "code", "img"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "class", "src", "alt"}


class Text(HTMLParser):
    """The text of a page; `tags` that are in it, and the attributes of all of them."""

    @classmethod
    def of(cls, page):
        parser = cls()
        parser.feed(page)
        return parser

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data

    def __contains__(self, text):
        return text in self.text


def test_text_of_rows_is_escaped_in_the_page_and_on_the_terminal(damaged, tmp_path, capsys):
    evil = STEERING + SCRIPT
    rows = [
        conversation(evil, "<image>", "x", image=evil),
        conversation(evil, evil.replace("\ud83d", ""), evil.replace("\ud83d", "")),
        {"id": evil, "conversations": [{"from": evil, "value": evil}]},
        {"id": {"deep": evil}, "conversations": evil},
        {"id": 10**400, "conversations": [{"from": "human", "value": "x" * 10**6}]},
        {"id": "y" * 10**6, "image": "z" * 10**6, "conversations": ROWS[0][0]["conversations"]},
    ]
    images = tmp_path / "images"
    name = SCRIPT.replace("/", "") + "\x1b[31m.jpg"
    for copy in ("", "copy"):
        (images / f"{copy}{name}").write_bytes((images / "a.jpg").read_bytes())
        rows.append(conversation(f"{copy}{name}", "<image>", "x", image=f"{copy}{name}"))
    path = tmp_path / "<script>\x1b[31m.json"
    path.write_text(json.dumps(rows))
    out = tmp_path / "report"
    assert prepare("check", *damaged, "--json", path, "--decode", "--show", 99, "--out", out, "--color", "never") == 2
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\x07", "\x9b", "\u202e", "\ud83d", "\r"}
    assert "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\u202e" in printed
    page = Text.of((out / "report.html").read_text(encoding="utf-8"))
    assert page.tags <= TAGS
    assert page.attributes <= ATTRIBUTES
    assert "<script>alert(1)</script>" in page.text
    assert not set(page.text) & {"\x1b", "\x07", "\x9b", "\u202e", "\r"}
    report = json.loads((out / "report.json").read_text())
    assert report["rows"]["rows"] == len(rows)
    assert (out / "report.html").stat().st_size < 30_000
    assert len(printed) < 60_000
    assert report["duplicate_images"]["examples"][0]["count"] == 2


def test_an_unreadable_file_is_one_line(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[{"id": 1}, {"id": ')
    script = (
        "from neva_jax.errors import CommandParser, exit_with\n"
        "from neva_jax.prepare_commands import check, check_flags\n"
        "parser = CommandParser()\ncheck_flags(parser)\nexit_with(lambda: check(parser.parse_args()))"
    )
    done = subprocess.run([sys.executable, "-c", script, "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_lengths_makes_what_packing_reads(damaged, tmp_path, capsys):
    assert prepare("lengths", *damaged, "data.pack=true") == 0
    first = capsys.readouterr().out
    bad = sum(kind not in NEEDS_DECODING and kind != "image_missing" for kind in EXPECTED.values())
    assert f"{len(ROWS)} rows, " in first
    (table,) = (tmp_path / "cache").glob("lengths-*.npy")
    assert f"  in {table}" in first
    assert "rows/s" in first
    state = np.load(table)["state"]
    assert f"{(state == 1).sum()} bad, 0 dropped" in first
    assert (state == 1).sum() in (bad, bad + 1)  # the row that is too long, and lacks its image
    said = r"packed: 26 samples in (\d+) rows of 192 tokens and at most 1 image tiles, ([\d.]+) % of the tokens useful$"
    useful = re.search(said, first, re.MULTILINE)
    tokens = int(np.load(table)["tokens"].sum())
    assert float(useful[2]) == pytest.approx(100 * tokens / (int(useful[1]) * 192), abs=0.05)
    assert prepare("lengths", *damaged) == 0
    second = capsys.readouterr().out
    assert "all of it was there already" in second
    assert "data.pack is false" in second


def test_training_finds_the_tables_and_plans(small_overrides, tmp_path, capsys, tokenizer, monkeypatch):
    from neva_jax.configfile import load_config
    from neva_jax.data.lengths import row_lengths

    overrides = [*small_overrides, f"data.cache={tmp_path / 'cache'}", "data.pack=true"]
    assert prepare("lengths", *overrides) == 0
    assert capsys.readouterr().out.count("measured in") == 2
    settings = load_config(None, overrides)
    for split, shuffle in (("train", True), ("val", False)):
        rows, said = Sources(settings.data, split, settings.run.seed, shuffle), []
        tables = row_lengths(rows, settings, tokenizer, said.append)
        assert said == []
        monkeypatch.setattr(Plans, "_make", lambda self, epoch: pytest.fail("no plan was there"))
        assert Plans(rows, tables, settings)[0].rows > 0


def test_lengths_needs_a_tokenizer(damaged):
    at = damaged.index("--tokenizer")
    with pytest.raises(UserError, match="--tokenizer is not set"):
        prepare("lengths", *damaged[:at], *damaged[at + 2 :])
