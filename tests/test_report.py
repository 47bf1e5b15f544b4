"""The report page: whole without the network, true to the pixels and values it is given, calm with missing ones."""

import base64
import io
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fused_beit.engine.training.report import PictureRow, Report, mask_picture, picture_sheet, write_report
from fused_beit.engine.training.report.charts import bin_curve, nice_ticks

VOID = {"meta", "img", "br", "link", "input", "line", "path"}


class Page(HTMLParser):
    """A parsed page: every element with its attributes and classes above it, and whether all tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.text: list[tuple[str, list[str]]] = []
        self.feed(self.source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.elements.append((tag, values, [name for _, name in self.open]))
        if tag not in VOID:
            self.open.append((tag, values.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {n: v or "" for n, v in attrs}, [name for _, name in self.open]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append((data, [tag for tag, _ in self.open]))

    def words(self, tag: str) -> str:
        """All text inside elements of one name."""
        return " ".join("".join(data for data, inside in self.text if tag in inside).replace("\u202f", " ").split())


def page(tmp_path: Path, report: Report) -> Page:
    path = tmp_path / "report.html"
    write_report(path, report)
    return Page(path)


def history(num: int = 30) -> list[dict[str, float]]:
    rows = [{"step": s, "loss": 4 - 2 * s / num, "mlm_acc": 0.5 * s / num, "lr": 1e-3} for s in range(1, num + 1)]
    return [*rows, {"step": num, "val_loss": 1.54, "val_mlm_acc": 0.48}]


def examples(num: int = 3, size: int = 32, decoder: bool = True) -> list[PictureRow]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        given, reconstructed, filled = rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8)
        masked = mask_picture(given, [0, 9, -1], 4)
        rows.append(
            PictureRow(given, masked, *((reconstructed, filled) if decoder else ()), masked_positions=[0, 9, -1])
        )
    return rows


def embedded(parsed: Page, stage: str) -> list[np.ndarray]:
    sources = [a["src"] for tag, a, above in parsed.elements if tag == "img" and f"stage {stage}" in above]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def full_report(**changes: object) -> Report:
    values: dict[str, object] = {
        "title": "output/digits",
        "subject": "handwritten digits",
        "history": history(),
        "token_entropy": 2.86,
        "commonest_share": 0.15,
        "pictures": examples(),
        "settings_result": {"model.depth": 4},
        "settings_speed": {"train.threads": None},
        "machine": {"Device": "CPU"},
        "tokenizer": {"Codes": 64},
        "checkpoint": "output/digits/last",
        "next_command": "deepspeed engine/pretrain.py --data.path PICTURES",
    }
    return Report(**(values | changes))


def test_page_loads_nothing(tmp_path: Path) -> None:
    parsed = page(tmp_path, full_report())
    for tag, attributes, _ in parsed.elements:
        assert tag not in {"link", "script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert attributes.get(name, "data:").startswith("data:"), f"<{tag} {name}> loads {attributes[name]}"
    assert not re.search(r"https?:|//\w|@import|url\(", parsed.words("style"))


@pytest.mark.parametrize("stage", ["given", "masked", "reconstructed", "filled"])
def test_every_stage_shows_its_pictures_unchanged(tmp_path: Path, stage: str) -> None:
    rows = examples(4)
    shown = embedded(page(tmp_path, full_report(pictures=rows)), stage)
    assert len(shown) == 4
    for picture, row in zip(shown, rows, strict=True):
        np.testing.assert_array_equal(picture, getattr(row, stage))


def test_every_stage_has_a_caption(tmp_path: Path) -> None:
    parsed = page(tmp_path, full_report())
    captions = [above[-1] for tag, _, above in parsed.elements if tag == "figcaption" and above[-1].startswith("stage")]
    assert captions == ["stage given", "stage masked", "stage reconstructed", "stage filled"]
    for title in ("As given", "Masked", "Tokenizer", "Model"):
        assert title in parsed.words("figcaption")


def test_tokenizer_without_decoder_leaves_two_stages_and_says_so(tmp_path: Path) -> None:
    parsed = page(tmp_path, full_report(pictures=examples(decoder=False)))
    assert len(embedded(parsed, "given")) == len(embedded(parsed, "masked")) == 3
    assert embedded(parsed, "reconstructed") == embedded(parsed, "filled") == []
    assert "no decoder" in parsed.words("p")


def test_outline_encloses_the_hidden_patches(tmp_path: Path) -> None:
    given = np.zeros((8, 8, 3), np.uint8)
    row = PictureRow(given, given, given, given, masked_positions=[0, 1, 2], patch_size=4, tokens_right=1)
    parsed = page(tmp_path, full_report(pictures=[row]))
    paths = [a["d"] for tag, a, above in parsed.elements if tag == "path" and above[-1] == "outline"]
    # A corner of three patches has eight outer edges; the edges between them are not drawn.
    edges = ["0 0h1", "1 0h1", "1 1h1", "0 2h1", "0 0v1", "0 1v1", "1 1v1", "2 0v1"]
    assert sorted(paths[0].split("M")[1:]) == sorted(edges)
    assert "1 of 3 right" in parsed.words("small")


def test_headline_says_what_happened(tmp_path: Path) -> None:
    parsed = page(tmp_path, full_report(val_pictures=360))
    assert parsed.words("h1") == "BEiT learned to fill in handwritten digits"
    assert (
        "On 360 held-out pictures it names the hidden token right 48 % of the time; "
        "always guessing the commonest token would give 15 %." in parsed.words("p")
    )


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.10, "has not yet learned"), (0.16, "has begun to learn")])
def test_headline_does_not_boast(tmp_path: Path, accuracy: float, verdict: str) -> None:
    assert verdict in page(tmp_path, full_report(val_mlm_acc=accuracy)).words("h1")


def test_key_figures_compare_with_guessing(tmp_path: Path) -> None:
    parsed = page(tmp_path, full_report())
    assert "3.2 times the commonest token\u2019s 15 %" in parsed.words("small")
    assert "46 % below the token entropy, 2.86" in parsed.words("small")


@pytest.mark.parametrize(("title", "value"), [("Loss", 2.86), ("Accuracy", 0.15)])
def test_reference_line_stands_at_its_value(tmp_path: Path, title: str, value: float) -> None:
    elements = page(tmp_path, full_report()).elements
    charts = {
        a["aria-label"].split()[0]: index
        for index, (tag, a, _) in enumerate(elements)
        if tag == "svg" and "aria-label" in a
    }
    lines = []
    for tag, attributes, _ in elements[charts[title] + 1 :]:
        if tag == "svg":
            break
        if tag == "line":
            lines.append(attributes)
    ticks = sorted((float(a["y1"]), float(a["data-value"])) for a in lines if a["class"] == "tick")
    (reference,) = [float(a["y1"]) for a in lines if a["class"] == "reference"]
    heights, values = zip(*ticks, strict=True)
    pixel = (max(values) - min(values)) / (max(heights) - min(heights))
    # Heights are written in tenths of a pixel.
    assert np.interp(reference, heights, values) == pytest.approx(value, abs=0.1 * pixel)


def test_words_from_the_user_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    parsed = page(
        tmp_path,
        full_report(
            title=evil,
            subject=evil,
            model=evil,
            finished=evil,
            notes=[evil],
            settings_result={evil: evil, f"{evil}.{evil}": evil},
            settings_speed={evil: [evil]},
            machine={evil: evil},
            tokenizer={evil: evil},
            bad_pictures=[evil],
            bad_count=1,
            checkpoint=evil,
            next_command=evil,
            next_purpose=evil,
        ),
    )
    assert "<script" not in parsed.source
    assert parsed.source.count(escape(evil)) >= 18


def test_name_that_is_no_text_is_written(tmp_path: Path) -> None:
    assert "bad\udcff.jpg".encode("utf-8", "surrogateescape") == b"bad\xff.jpg"
    assert "bad?.jpg" in page(tmp_path, full_report(bad_pictures=["bad\udcff.jpg: truncated"], bad_count=1)).words("li")


def test_bad_pictures_beyond_the_list_are_counted(tmp_path: Path) -> None:
    parsed = page(tmp_path, full_report(bad_pictures=[f"{i}.jpg: empty" for i in range(80)], bad_count=1200))
    assert "49.jpg: empty" in parsed.words("li") and "50.jpg: empty" not in parsed.words("li")
    assert "and 1,150 more" in parsed.words("li")


def test_report_of_nothing_is_a_whole_page(tmp_path: Path) -> None:
    parsed = page(tmp_path, Report(title="nothing"))
    assert parsed.words("h1") == "BEiT ran no step on pictures"
    assert "nan" not in parsed.words("body").lower()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "NaN"])
def test_values_that_are_not_finite_are_left_out(tmp_path: Path, value: object) -> None:
    names = ("loss", "mlm_acc", "lr", "grad_norm", "images_per_s", "data_wait", "val_loss", "val_mlm_acc")
    parsed = page(
        tmp_path,
        full_report(
            history=[{"step": 1} | dict.fromkeys(names, value), {"step": value, "loss": 1.0}, {}],
            token_entropy=value,
            commonest_share=value,
            val_loss=value,
            duration=value,
            images_seen=value,
        ),
    )
    assert not re.search(r"\b(nan|inf)\b", parsed.source.split("</style>")[1].lower())
    assert "No finite value was logged" in parsed.words("p")


def test_single_step_and_constant_values_are_drawn(tmp_path: Path) -> None:
    row = {"step": 7, "loss": 0.0, "mlm_acc": 0.0, "lr": 0.0, "grad_norm": 1.0, "weight_decay": 0.05}
    for rows in ([row], [row | {"step": step} for step in range(5)]):
        parsed = page(tmp_path, full_report(history=rows, token_entropy=None, commonest_share=None))
        drawn = [a["aria-label"].split(" over")[0] for tag, a, _ in parsed.elements if "aria-label" in a]
        assert drawn == ["Loss", "Accuracy", "Learning rate", "Gradient norm"]
        paths = [a["d"] for tag, a, _ in parsed.elements if tag == "path" and a["class"].endswith("training")]
        assert len(paths) == 4 and all(paths) and "nan" not in "".join(paths)


def test_gap_in_a_curve_stays_a_gap(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float("nan") if step == 3 else 1.0 + step} for step in range(1, 6)]
    parsed = page(tmp_path, full_report(history=rows))
    (curve,) = [a["d"] for tag, a, _ in parsed.elements if a.get("class") == "curve training"]
    assert curve.count("M") == 2 and curve.count("L") == 2


def test_resumed_steps_replace_the_lost_ones(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 2.0}]
    parsed = page(tmp_path, full_report(history=rows, token_entropy=None))
    (curve,) = [a["d"] for tag, a, _ in parsed.elements if a.get("class") == "curve training"]
    heights = [float(point.split()[1]) for point in curve[1:].split("L")]
    assert len(heights) == 3 and heights == sorted(heights)


def test_spike_does_not_flatten_the_chart_and_is_named(tmp_path: Path) -> None:
    rows = [{"step": step, "grad_norm": 1 + step % 5 / 10} for step in range(100)]
    rows[50]["grad_norm"] = 5000.0
    parsed = page(tmp_path, full_report(history=rows))
    assert "highest value 5,000, cut off" in parsed.words("figcaption")
    (ticks,) = [
        [float(line["data-value"]) for tag, line, _ in parsed.elements if line.get("class") == "tick"],
    ]
    assert max(ticks) < 10


def test_long_history_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("loss", "mlm_acc", "lr", "grad_norm", "images_per_s", "data_wait")
    rows = [{"step": step, **dict(zip(names, rng.random(6), strict=True))} for step in range(100_000)]
    rows += [{"step": step, "val_loss": 1.0, "val_mlm_acc": 0.5} for step in range(0, 100_000, 10)]
    assert len(page(tmp_path, full_report(history=rows)).source) < 500_000


def test_merged_curve_keeps_ends_mean_and_spread() -> None:
    values = np.sin(np.arange(10_000.0))
    values[5000] = 99.0
    binned = bin_curve(np.arange(10_000.0), values, 100)
    assert binned.low is not None and binned.high is not None
    assert (binned.steps[0], binned.steps[-1]) == (0, 9999)
    assert binned.high.max() == 99.0 and binned.low.min() == values.min()
    np.testing.assert_allclose(binned.mean[0], values[:100].mean())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (1.5, 4.2, [1, 2, 3, 4, 5]), (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(expected)


def test_mask_covers_the_named_patches_only() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    before = picture.copy()
    covered = mask_picture(picture, np.array([1, 5, -1]), 4)
    np.testing.assert_array_equal(picture, before)
    hidden = np.zeros((8, 12), bool)
    hidden[0:4, 4:8] = hidden[4:8, 8:12] = True
    np.testing.assert_array_equal(covered[~hidden], picture[~hidden])
    assert len(np.unique(covered[hidden], axis=0)) == 2  # the cover and its edge


@pytest.mark.parametrize(
    ("shape", "positions", "patch"), [((8, 8, 3), [4], 4), ((8, 8, 3), [-2], 4), ((9, 8, 3), [0], 4), ((8, 8), [0], 4)]
)
def test_mask_that_does_not_fit_is_refused(shape: tuple[int, ...], positions: list[int], patch: int) -> None:
    with pytest.raises(ValueError):
        mask_picture(np.zeros(shape, np.uint8), positions, patch)


def test_picture_of_floats_is_refused(tmp_path: Path) -> None:
    wrong = np.zeros((8, 8, 3), np.float32)
    with pytest.raises(ValueError, match=r"expected a uint8 picture \[H, W, 3\], got float32"):
        write_report(tmp_path / "report.html", full_report(pictures=[PictureRow(wrong, wrong)]))
    assert list(tmp_path.iterdir()) == []


def test_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    page(tmp_path, full_report(title="first"))
    assert "first" not in page(tmp_path, full_report(title="second")).words("title")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_sheet_holds_all_stages(tmp_path: Path) -> None:
    rows = examples(2, size=64)
    picture_sheet(rows, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (8 + 4 * 136, 8 + 2 * 136, 3)
    np.testing.assert_array_equal(sheet[8 + 3 * 136 :, 8 + 136 :][:128:2, :128:2], rows[1].filled)
