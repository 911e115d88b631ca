"""The page that compares runs: what it says is what the runs say, whatever they lack; and it is worked in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import UserError
from tests.shared.test_inspect import Browser, in_browser
from tests.train.conftest import train_options
from tests.train.made_sweep import make_run
from train.compare import settings, words, write
from train.compare.__main__ import main
from train.compare.data import Comparison, Figure, figures
from train.compare.gather import gather, named
from train.compare.measures import BY_NAME
from train.compare.page import page
from train.compare.payload import FIRST, panels, payload
from train.compare.pictures import Album, album
from train.compare.read import find
from train.compare.statistics import mean_interval, t95, thin
from train.trainer import train

NOW = datetime(2030, 1, 2, 3, 4)
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>{{script}}<!--"
DEPTHS = {"1-1": 0.5, "2-4": 0.8, "4-10": 0.7}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three depths; of the best one three seeds; one that failed before its first step, and one still training."""
    folder = tmp_path_factory.mktemp("sweeps") / "first"
    for depth, quality in DEPTHS.items():
        for seed in range(3 if depth == "2-4" else 1):
            make_run(folder / f"depth-{depth}_seed-{seed}", depth=depth, seed=seed, quality=quality + 0.01 * seed)
    make_run(folder / "depth-5-10_seed-0", depth="5-10", until=30)
    states: dict[str, Any] = {path.name: {"outcome": "trained", "varied": {}} for path in folder.iterdir()}
    states["depth-5-10_seed-0"]["outcome"] = "waiting"
    states["depth-9-9_seed-0"] = {"outcome": "failed", "exit_code": 2, "why": f"out of memory {HOSTILE}"}
    (folder / "sweep.json").write_text(json.dumps({"grid": {}, "experiments": states}))
    return folder


@pytest.fixture(scope="module")
def compared(sweep: Path) -> Comparison:
    return gather([sweep])


@pytest.fixture(scope="module")
def pictures(sweep: Path, compared: Comparison) -> Album:
    return album(compared, named(find([sweep])))


class Tags(HTMLParser):
    """Attributes of a page's tags, as a browser reads them: (tag, name, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]


def run_of(comparison: Comparison, name: str) -> Any:
    return next(run for run in comparison.runs if run.name == name)


def embedded(html: str) -> dict[str, Any]:
    """The data, as a browser finds them."""
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


# --- figures ---


def test_quantiles_are_those_of_the_table() -> None:
    table = {1: 12.706, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 1000: 1.9623}
    assert {degrees: round(t95(degrees), 4) for degrees in table} == pytest.approx(table, abs=5e-4)


def test_an_interval_over_seeds_is_students() -> None:
    mean, half = mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.3027 * math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3), rel=1e-4)
    assert mean_interval([3.0]) == (3.0, None)


def test_a_shortened_curve_keeps_its_mean_and_its_last_step() -> None:
    steps, values = thin(range(1, 1001), [float(i) for i in range(1000)], 100)
    assert (len(steps), steps[-1]) == (100, 1000)
    assert sum(values) / 100 == pytest.approx(499.5)
    assert thin([1, 2], [0.5, 0.25], 100) == ([1, 2], [0.5, 0.25])


def test_settings_are_ranked_by_adherence_and_seeds_give_the_interval(compared: Comparison) -> None:
    assert compared.ranked_by == "adherence/edge_f1"
    assert [setting.differs["depth"] for setting in compared.settings[:2]] == ["2-4", "4-10"]
    assert [len(setting.runs) for setting in compared.settings] == [3, 1, 1, 1, 1]
    best, second = (setting.final[compared.ranked_by] for setting in compared.settings[:2])
    values = [compared.runs[i].final[compared.ranked_by].value for i in compared.settings[0].runs]
    mean, half = mean_interval(values)
    assert half is not None
    assert best == Figure(mean, mean - half, mean + half, "seeds", 3, 100)
    assert (second.over, second.count, second.step) == ("samples", 16, 100)
    assert second.high is not None
    assert second.high - second.value == pytest.approx(t95(15) * 0.012)  # the standard error that the look stated


@pytest.mark.parametrize(("value", "followed"), [(0.18, False), (0.4, True)])
def test_what_is_no_better_than_chance_is_not_praised(tmp_path: Path, value: float, followed: bool) -> None:
    run = make_run(tmp_path / "only", pictures=0)
    scores = {"edge_f1": value, "edge_f1_error": 0.02, "edge_f1_without": 0.17, "edge_f1_other": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "adherence": scores}) + "\n")
    html = write([tmp_path], tmp_path / "page.html").read_text()
    assert ("No setting follows its drawing yet" in html) != followed


def test_a_lower_loss_ranks_first_where_there_is_nothing_else(tmp_path: Path) -> None:
    for name, loss in (("a", 0.5), ("b", 0.4)):
        make_run(tmp_path / name, depth="1-1" if name == "a" else "2-2", pictures=0)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 9, "held_out": {"loss": loss}}) + "\n")
    compared = gather([tmp_path])
    assert compared.ranked_by == "held_out/loss"
    assert [run.name for run in compared.runs] == ["b", "a"]
    assert compared.lead is not None
    assert compared.lead.difference == pytest.approx(0.1)


def test_a_lead_is_of_differences_between_runs_of_the_same_seed(tmp_path: Path) -> None:
    for depth, gain in (("1-1", 0.0), ("2-2", 0.02)):
        for seed in range(3):
            run = make_run(tmp_path / f"{depth}-{seed}", depth=depth, seed=seed, pictures=0)
            value = 0.3 * seed + gain + 0.001 * seed * (gain > 0)  # seeds differ far more than depths
            line = {"step": 100, "adherence": {"edge_f1": value}}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    lead = gather([tmp_path]).lead
    assert lead is not None
    assert lead.paired
    assert lead.difference == pytest.approx(0.021)
    assert lead.half == pytest.approx(4.3027 * 0.001 / math.sqrt(3), rel=1e-3)


def test_seeds_that_did_not_come_to_their_end_are_not_in_the_mean(tmp_path: Path) -> None:
    for seed, until in ((0, 100), (1, 100), (2, 30)):
        make_run(tmp_path / str(seed), seed=seed, until=until, pictures=0)
    compared = gather([tmp_path])
    (setting,) = compared.settings
    assert (len(setting.runs), setting.final["adherence/edge_f1"].count) == (3, 2)
    assert any("Not finished" in caveat and "2" in caveat for caveat in compared.caveats)


def test_the_same_seed_twice_counts_once_and_is_said_to_be_identical_or_not(tmp_path: Path) -> None:
    for name, seed, quality in (("a", 0, 0.8), ("b", 0, 0.8), ("c", 1, 0.7), ("d", 1, 0.8)):
        make_run(tmp_path / name, seed=seed, quality=quality, pictures=0)
    compared = gather([tmp_path])
    (setting,) = compared.settings
    assert (len(setting.runs), setting.final["held_out/loss"].count) == (4, 2)
    said = " ".join(compared.notes)
    assert "a and b are the same experiment with the same seed; their figures are identical" in said
    assert "c and d are the same experiment with the same seed; their figures are not identical" in said


def test_sudden_convergence_is_found_where_the_curve_rises(compared: Comparison) -> None:
    for name in ("depth-2-4_seed-0", "depth-4-10_seed-0"):
        found = run_of(compared, name).convergence
        assert found["adherence/edge_f1"] in (30, 40, 50)  # made to rise at 40
        assert found["held_out/condition_gap"] in (30, 40, 50)
    assert run_of(compared, "depth-5-10_seed-0").convergence == {}  # not yet


def test_times_and_starts_are_no_figures(sweep: Path, compared: Comparison, tmp_path: Path) -> None:
    again = tmp_path / "first"
    shutil.copytree(sweep, again)
    for path in again.glob("*/run.json"):
        stated = json.loads(path.read_text())
        stated["starts"] = [{"step": 0}, {**stated["starts"][0], "git_revision": "1" * 40, "versions": {"torch": "9"}}]
        path.write_text(json.dumps(stated))
    for path in again.glob("*/config.yaml"):
        path.write_text(
            path.read_text().replace("runs: runs", "runs: elsewhere").replace("cache: cache", "cache: /there")
        )
    for path in again.glob("*/metrics.jsonl"):
        slower = re.sub(r'"(device_hours|step_seconds|look_share)": ([0-9.e-]+)', r'"\1": 7\2', path.read_text())
        path.write_text(slower)
    second = gather([again])
    assert second.runs[0].machine != compared.runs[0].machine
    assert figures(second) == figures(compared)
    json.dumps(figures(second), allow_nan=False)
    metrics = again / "depth-2-4_seed-1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"edge_f1": 0.', '"edge_f1": 0.0', 1))
    assert figures(gather([again])) != figures(compared)


def test_a_changed_picture_is_a_changed_figure(sweep: Path, compared: Comparison, tmp_path: Path) -> None:
    again = tmp_path / "first"
    shutil.copytree(sweep, again)
    shutil.copy(
        sweep / "depth-2-4_seed-0/pictures/step-00000025/00.png", again / "depth-2-4_seed-0/pictures/step-00000050"
    )
    assert figures(gather([again])) != figures(compared)


def test_what_training_writes_is_what_the_page_reads(tiny_cache: Path, tmp_path: Path) -> None:
    looks = {"every": 1, "samples": 2, "timesteps": 2, "pictures_every": 2, "pictures": 2, "picture_steps": 1}
    train(train_options(tiny_cache, tmp_path, steps=2, validation={**looks, "adherence_every": 2}))
    compared = gather([tmp_path])
    (run,) = compared.runs
    assert (run.state, run.step, run.global_batch, compared.notes) == ("trained", 2, 2, [])
    assert compared.ranked_by in ("adherence/region_iou", "adherence/edge_f1")
    assert {*panels(compared)[0]} == {BY_NAME[name] for name in (compared.ranked_by, *FIRST)}
    assert run.samples_seen.values[-1] == 4
    assert run.machine.hours.values[-1] > 0
    assert [t for t, _, _ in run.by_time] == [0.25, 0.75]
    assert {f"{compared.ranked_by}_{kind}" for kind in ("without", "other", "ceiling")} <= run.references.keys()
    assert len(run.pictures) == len(run.captions) == 2
    made = album(compared, {run.name: tmp_path / run.name})
    assert [still.keys() for still in made.stills.values()] == [{"drawing", "original", "without"}] * 2
    assert run.num_parameters
    assert None not in (run.machine.look_share, run.machine.data_wait_share, run.machine.step_seconds)


# --- what runs may lack ---


def test_runs_may_lack_anything(tmp_path: Path) -> None:
    make_run(tmp_path / "whole")
    make_run(tmp_path / "losses", depth="1-1", adherence=False, pictures=0)
    cut = make_run(tmp_path / "cut", depth="1-2") / "metrics.jsonl"
    cut.write_text(cut.read_text() + '{"step": 101, "lo')
    middle = make_run(tmp_path / "middle", depth="1-3", pictures=0) / "metrics.jsonl"
    middle.write_text(middle.read_text().replace('{"step": 50, "loss"', '{"ste', 1))
    begun = make_run(tmp_path / "begun", depth="1-4", until=0, pictures=0)
    (begun / "metrics.jsonl").unlink()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"starts": [')
    (make_run(tmp_path / "unpainted", depth="2-2") / "pictures" / "step-00000100" / "00.png").write_bytes(b"no picture")
    old = make_run(tmp_path / "old", depth="2-1", pictures=0)
    (old / "pictures").mkdir()
    source = tmp_path / "whole" / "pictures" / "step-00000100"
    shutil.copy(source / "00.png", old / "pictures" / "step-00000100.png")
    compared = gather([tmp_path])
    assert len(compared.runs) == 9
    assert compared.ranked_by == "held_out/condition_gap"  # that is what the most runs have
    assert len(run_of(compared, "cut").series["loss"].steps) == 100
    assert len(run_of(compared, "middle").series["loss"].steps) == 99
    assert any("middle" in note and "1 line" in note for note in compared.notes)
    assert any("broken" in note for note in compared.notes)
    html = write([tmp_path], tmp_path / "page.html").read_text()
    assert all(name in html for name in ("whole", "losses", "begun", "bare", "old"))
    assert "no picture that can be read" in html
    data = embedded(html)
    assert data["runs"][[run["name"] for run in data["runs"]].index("old")]["painted"][""][0][0] == 100


def test_a_single_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "only")
    html = write([run], tmp_path / "page.html").read_text()
    assert "<b>only</b> has Edge F1" in html
    assert "same options" in html


def test_an_experiment_that_failed_is_shown_with_its_reason(sweep: Path, compared: Comparison, pictures: Album) -> None:
    failed = run_of(compared, "depth-9-9_seed-0")
    assert (failed.state, failed.why) == ("failed", f"out of memory {HOSTILE}")
    assert "out of memory &lt;/script&gt;" in page(compared, pictures, "first", NOW)


def test_what_a_shell_brings_along_is_passed_over_and_nothing_at_all_is_refused(sweep: Path, tmp_path: Path) -> None:
    (sweep / "depth-1-1.log").write_text("")
    given = sorted(sweep.iterdir())
    assert sorted(find(given)) == sorted(path for path in find([sweep]) if path.is_dir())
    with pytest.raises(UserError, match="does not exist"):
        find([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run in"):
        find([tmp_path])


def test_the_command_writes_the_page(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    runs = [str(sweep / "depth-1-1_seed-0"), str(sweep / "depth-2-4_seed-0")]
    monkeypatch.setattr("sys.argv", ["compare", "--runs", *runs, "--out", str(out)])
    assert main() == 0
    assert f"{out}: " in capsys.readouterr().out
    assert len(embedded(out.read_text())["runs"]) == 2
    monkeypatch.setattr("sys.argv", ["compare"])
    with pytest.raises(UserError, match="--runs needs"):
        main()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for part in ("a", "b"):
        make_run(tmp_path / part / "same", pictures=0)
    assert [*named([tmp_path / "a" / "same", tmp_path / "b" / "same"])] == ["a/same", "b/same"]


def test_runs_that_do_not_compare_are_said_not_to(compared: Comparison) -> None:
    first, second = compared.runs[0], replace(
        compared.runs[3], facts={**compared.runs[3].facts, "cache.latents": "other", "condition": ["depth"]}
    )  # fmt: skip
    said = " ".join(settings.compare([first, second], compared.ranked_by, []).caveats)
    assert "different caches" in said
    assert "different conditions" in said


def test_what_differs_is_what_differs(tmp_path: Path) -> None:
    make_run(tmp_path / "a", pictures=0)
    make_run(tmp_path / "b", pictures=0, changes={"objective.shift": 2.5})
    make_run(tmp_path / "c", pictures=0, rate=3e-5)
    differences = gather([tmp_path]).differences
    assert set(differences) == {"objective.shift", "optimizer.learning_rate"}
    html = write([tmp_path], tmp_path / "page.html").read_text()
    assert html.count('class="other"') == 2  # one value each that only a minority has


def test_pictures_of_many_steps_are_thinned_alike_and_the_last_ones_stay(
    sweep: Path, compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.compare.pictures._MOST", 30)
    found = album(compared, named(find([sweep])))
    shown = {name: [step for step, _ in samples["s004"]] for name, samples in found.painted.items()}
    assert shown["depth-5-10_seed-0"][-1] == 30
    assert {steps[-1] for name, steps in shown.items() if name != "depth-5-10_seed-0"} == {100}
    assert sum(map(len, shown.values())) * 2 <= 30
    assert found.num_left_out > 0


# --- numbers and the page ---


@pytest.mark.parametrize(
    ("value", "half", "told"),
    [
        (0.83123, 0.0214, ("0.831", "\u00b1 0.021")),
        (-0.5, 0.3, ("\u22120.50", "\u00b1 0.30")),
        (12.3, 4.0, ("12.3", "\u00b1 4.0")),
        (0.5, 0.0, ("0.5000", "\u00b1 0")),
        (0.5, None, ("0.5000", "")),
    ],
)
def test_a_value_has_the_decimals_of_its_interval(value: float, half: float | None, told: tuple[str, str]) -> None:
    assert words.with_half(value, half) == told


def test_the_page_asks_the_network_for_nothing_and_nothing_of_a_run_becomes_markup(
    compared: Comparison, pictures: Album, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "a<b>", depth="1-1", changes={"tracker": HOSTILE, "model": HOSTILE})
    (run / "pictures" / "held-out.json").write_text(json.dumps([{"key": HOSTILE, "caption": HOSTILE}]))
    make_run(tmp_path / "b", depth="2-2")
    hostile = write([tmp_path], tmp_path / "page.html").read_text()
    assert HOSTILE in [sample["caption"] for sample in embedded(hostile)["samples"]]
    assert any(HOSTILE in setting["label"] for setting in embedded(hostile)["settings"])
    for html in (page(compared, pictures, HOSTILE, NOW), hostile):
        assert html.count("<script") == html.count("</script") == 2  # the data, and the page's own
        assert "<img" not in html
        assert "<!--" not in html
        found = Tags()
        found.feed(html)
        places = [value for _, name, value in found.attributes if name in ("src", "href", "action")]
        assert {(place or "")[:1] for place in places} == {"#"}
        assert not any(name.startswith("on") for _, name, _ in found.attributes)
        assert "url(" not in html.split("</style>")[0]


def test_every_curve_of_the_issue_is_there(compared: Comparison, pictures: Album) -> None:
    first, more = panels(compared)
    names = ["adherence/edge_f1", "held_out/condition_gap", "held_out/control_gap", "held_out/loss", "loss"]
    assert [measure.name for measure in first] == names
    assert {"adherence/ssim", "gradient_norm", "update_norm"} <= {measure.name for measure in more}
    data = payload(compared, pictures)
    run = data["runs"][0]
    assert run["samples"][1][-1] == 4 * 100
    assert run["hours"][1][-1] == pytest.approx(100 * 0.4 / 3600, rel=1e-4)
    assert data["clock"] == "GPU hours"


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -r requirements-dev.txt")
    opened = Browser()
    try:
        yield opened
    finally:
        opened.driver.quit()


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write([sweep], tmp_path_factory.mktemp("page") / "page.html")


def lines_of(browser: Browser, panel: int = 0) -> int:
    """Lines in one of the panels."""
    script = "return document.querySelectorAll('#panels svg')[arguments[0]].querySelectorAll('path.line').length"
    return browser.run(script, panel)


def label(browser: Browser, panel: int = 0) -> str:
    return browser.run(
        "return document.querySelectorAll('#panels svg')[arguments[0]].querySelector('.label').textContent", panel
    )


@in_browser
def test_curves_are_drawn_and_the_x_axis_changes(browser: Browser, written: Path) -> None:
    browser.open(written)
    browser.until(lambda: len(browser.all("#panels svg")), 5)
    browser.until(lambda: lines_of(browser), 6)  # all but the failed one
    assert len(browser.all("#panels svg:first-of-type circle.ring")) > 0
    assert label(browser) == "steps"
    ends = (
        "return [...document.querySelector('#panels svg').querySelectorAll('path.line')].map(p => p.getAttribute('d'))"
    )
    before = browser.run(ends)
    browser.run("document.querySelector('input[value=samples]').click()")
    assert label(browser) == "samples seen"
    browser.run("document.querySelector('input[value=hours]').click()")
    assert label(browser) == "GPU seconds"
    assert browser.run(ends) == before  # all took equally long
    browser.run("document.querySelector('input[value=settings]').click()")
    assert lines_of(browser) == 4
    assert len(browser.all("#panels svg .band.always")) > 0


@in_browser
def test_the_legend_hides_runs_from_curves_and_pictures(browser: Browser, written: Path) -> None:
    browser.open(written)
    browser.until(lambda: lines_of(browser), 6)
    columns = len(browser.all("#matrix thead th"))
    browser.all("#chips .seed")[1].click()
    assert lines_of(browser) == 5
    assert len(browser.all("#matrix thead th")) == columns - 1
    browser.all("#chips .name")[0].click()  # shows all of them again, as one of them was hidden
    assert lines_of(browser) == 6
    browser.all("#chips .name")[0].click()
    assert lines_of(browser) == 3
    browser.one("#all").click()
    assert lines_of(browser) == 6


@in_browser
def test_pointing_at_a_curve_reads_every_run(browser: Browser, written: Path) -> None:
    from selenium.webdriver import ActionChains

    browser.open(written)
    browser.until(lambda: lines_of(browser), 6)
    svg = browser.one("#panels svg")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", svg)
    ActionChains(browser.driver).move_to_element_with_offset(svg, 200, 0).perform()
    browser.until(lambda: browser.one("#readout").is_displayed(), True)
    said = browser.one("#readout").text
    assert "Edge F1, 70 steps" in said or "Edge F1, 80 steps" in said or "Edge F1, 60 steps" in said
    assert len(browser.all("#readout tbody tr")) == 5  # the one that ended at 30 has no value here
    assert all(browser.run("return [...document.querySelectorAll('#panels .cross')].map(c => c.childElementCount > 0)"))


@in_browser
def test_the_slider_goes_through_the_pictures(browser: Browser, written: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(written)
    browser.until(lambda: browser.one("#step-shown").text, "100 of 100")
    sources = "return [...document.querySelectorAll('#matrix .picture img')].map(image => image.src)"
    last = browser.run(sources)
    assert len(last) == 6 * 2
    assert browser.run("return [...document.querySelectorAll('#matrix img')].every(image => image.naturalWidth > 0)")
    browser.one("#step").send_keys(Keys.ARROW_LEFT)
    browser.until(lambda: browser.one("#step-shown").text, "75 of 100")
    now = browser.run(sources)
    running = [k for k in range(len(now)) if now[k] == last[k]]
    assert len(running) == 2  # of the run that ended at 30 its last ones stay, and say so
    assert "step 30" in browser.one("#matrix").text
    browser.all("#matrix .picture")[0].click()
    assert browser.one("#detail-title").text.endswith("seed 0, step 75")
    browser.one("#next").click()
    assert browser.one("#detail-title").text.endswith("seed 0, step 100")
    browser.one("#close").click()


@in_browser
def test_the_table_is_sorted_by_a_click(browser: Browser, written: Path) -> None:
    browser.open(written)
    names = "return [...document.querySelectorAll('#runs-table tbody th strong')].map(cell => cell.textContent)"
    assert browser.run(names)[0] == "depth-2-4_seed-0"
    find_button = (
        "return [...document.querySelectorAll('#runs-table button')].find(b => b.textContent === arguments[0])"
    )
    for _ in range(2):
        browser.run("arguments[0].click()", browser.run(find_button, "Run"))
    assert browser.run(names)[0] == "depth-9-9_seed-0"
    button = browser.run(find_button, "Depth")
    browser.run("arguments[0].click()", button)
    depths = [name.split("_")[0] for name in browser.run(names)]
    assert depths == ["depth-1-1", *["depth-2-4"] * 3, "depth-4-10", "depth-5-10", "depth-9-9"]
    browser.run("arguments[0].click()", button)
    assert browser.run(names)[0].startswith("depth-5-10")
    assert browser.run(names)[-1].startswith("depth-9-9")  # nothing is known of it: last, either way


@in_browser
def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(browser: Browser, written: Path) -> None:
    browser.open(written)
    browser.until(lambda: lines_of(browser), 6)
    browser.run("document.querySelector('#more-curves').open = true")
    browser.until(lambda: len(browser.all("#more-panels path.line")) > 0, True)
    assert browser.run("return window.hacked") is None
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} == {"file", "data"}
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, written: Path, dark: bool) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        browser.open(written)
        browser.until(lambda: lines_of(browser), 6)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        light = browser.run("return getComputedStyle(document.body).backgroundColor").count("25") > 0
        assert light != dark
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_run_from_before_an_option_existed_is_of_the_same_setting(tmp_path: Path) -> None:
    old, new = (make_run(tmp_path / f"seed-{seed}", seed=seed) for seed in (0, 1))
    recorded = yaml.safe_load((old / "config.yaml").read_text())
    del recorded["ema"], recorded["early_stop"]
    recorded["objective"]["timesteps"] = "logit_normal"  # which is what `auto` is for FLUX
    (old / "config.yaml").write_text(yaml.safe_dump(recorded))
    comparison = gather([old, new])
    assert len(comparison.settings) == 1
    assert comparison.settings[0].label == "depth 2-4"
    assert comparison.settings == gather([new, old]).settings


def test_what_has_no_depth_is_not_said_to_have_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"seed-{seed}", seed=seed, adherence=False, changes={"adapter": "lora"})
    [setting] = (found := gather([tmp_path])).settings
    assert setting.label == "lora"
    assert {run.depth for run in found.runs} == {None}
