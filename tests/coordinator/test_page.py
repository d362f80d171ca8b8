"""The page of a report: the tables' own figures, nothing from elsewhere, every text as it is, and small."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from coordinator.page.document import page
from coordinator.page.ranks import LANES_MAX
from coordinator.page.ranks import chapter as ranks_chapter
from coordinator.report import failure_reasons, figure_text, percent_text, report_data, time_cell
from coordinator.reporting import NEEDS, ReportOptions, show_report
from coordinator.runview import RunView, names_of, view_run
from scheduling.errors import ConfigError
from scheduling.histogram import LogHistogram
from scheduling.tables import RANK, REQUEST
from storage.metrics import write_metrics
from storage.rundir import METRICS_NAME, SEGMENTS_NAME
from storage.runstatus import status
from tests.coordinator.runs import make_run, telemetry

pytestmark = pytest.mark.slow


class Read(HTMLParser):
    """What a page says, and what it is made of. Fails for tags that are not closed."""

    VOID = ("meta", "br", "path", "use", "line", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.words.append(data)
        if self.rows and self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == first)


def view(path: Path) -> RunView:
    return view_run(path, path.name, status(path))


def made(*paths: Path) -> str:
    views = [view_run(path, name, status(path)) for path, name in zip(paths, names_of(paths), strict=True)]
    return page(views, [failure_reasons(path) for path in paths])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one", failed=7, config={"slots": 16})


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return made(run)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "?"), (0.0, "0.0"), (0.0286, "0.029"), (0.5, "0.5"), (0.97, "1.0"), (9.96, "10.0"), (12345.6, "12,346")],
)
def test_a_rate_of_some_requests_in_an_hour_is_not_nothing(rate: float | None, text: str) -> None:
    assert figure_text(rate) == text


@pytest.mark.parametrize(
    ("longest_s", "texts"),
    [(0.4967, ["109.0 ms", "496.7 ms *"]), (4.9342, ["0.11 s", "4.93 s *"]), (418.5, ["0.1 s", "418.5 s *"])],
)
def test_times_of_one_row_have_one_unit_that_suits_the_longest(longest_s: float, texts: list[str]) -> None:
    values = {q: {"value": 0.109, "supported": True} for q in ("p50", "p95")}
    values["p99"] = {"value": longest_s, "supported": False}
    assert [time_cell(values, q) for q in ("p50", "p99")] == texts


def test_figures_are_those_of_the_tables_and_of_the_metrics(run: Path, text: str) -> None:
    read, data = Read(text), report_data(run)
    for latency, title in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("queue_s", "queue")):
        values = data["latencies"][latency]
        cells = [time_cell(values, q) for q in ("p50", "p95", "p99")]
        assert read.row(title) == [*cells, f"{values['p50']['samples']:,}"]
        for q, cell in zip(("P50", "P95", "P99"), cells, strict=True):
            assert f"{q} {cell}" in read.text
    assert figure_text(data["output_tokens_per_s"]) in read.text
    with h5py.File(run / METRICS_NAME, "r", locking=False) as file:
        rows, ranks, wall_s = file["requests"][:], file["ranks"][:], file.attrs["wall_s"]
    answered = rows[rows["ok"] == 1]
    assert read.row("end-to-end")[-1] == str(len(answered)) == "113"
    assert float(read.row("end-to-end")[0].split()[0]) == pytest.approx(1e3 * np.median(answered["e2e_s"]), rel=0.03)
    assert f"Throughput: {figure_text(float(rows['output_tokens'].sum() / wall_s))} output tokens/s" in read.text
    for rank in ranks:
        row = read.row(str(rank["rank"]))
        busy = percent_text(float(rank["busy_s"] / rank["wall_s"]))
        assert [row[2], row[4], row[5]] == [str(rank["requests"]), f"{rank['output_tokens']:,}", busy]


def test_energy_is_what_the_counters_say(run: Path, text: str) -> None:
    with h5py.File(run / METRICS_NAME, "r", locking=False) as file:
        samples, rows = file["telemetry"][:], file["requests"][:]
    joules = sum(np.ptp(samples["energy_j"][samples["rank"] == rank]) for rank in (1, 2))
    assert f"Energy: {joules / rows['output_tokens'].sum():.3g} J an output token" in Read(text).text
    assert f"{joules:,.0f} J on 2 GPUs" in Read(text).text


def test_nothing_comes_from_elsewhere_and_nothing_runs(text: str) -> None:
    read = Read(text)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "base", "foreignobject"}
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "action"), (tag, name)
            if name in ("href", "xlink:href"):
                assert value is not None
                assert value.startswith("#"), (tag, value)
    outside = re.findall(r"https?:|//\w|@import|url\((?!#)", text)
    assert outside == []


def test_texts_of_requests_and_of_the_run_are_escaped(text: str) -> None:
    assert "<script" not in text
    read = Read(text)
    assert '<script>alert(1)</script> & "x" \ufffd \ufffd ü' in read.text
    assert "\x00" not in text, "what no page may hold is replaced"
    assert "GPU <0>" in read.text


def test_every_picture_has_a_sentence_and_ids_are_its_own(text: str) -> None:
    read = Read(text)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert len(pictures) == 9, "five latencies, time, ranks, GPUs, processors"
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"] in ids
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | {
        str(attributes["href"])[1:] for _, attributes in read.tags if "href" in attributes
    }
    assert used <= set(ids)


def test_no_line_ends_between_a_figure_and_its_unit(text: str) -> None:
    said = re.findall(r"<(?:h2|h3|figcaption)[^>]*>([^<]*)<", text)
    assert sum("\N{NO-BREAK SPACE}" in one for one in said) > 5
    assert [one for one in said if re.search(r"\d (?:ms|s|%)(?!\w)|[s%] \*$", one)] == []


def test_colours_are_the_pages_own(text: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#0000\d\d|#00[0-9a-f]{4}", pictures), "a placeholder is left"
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", pictures)) <= {"#ffffff"}
    assert "prefers-color-scheme: dark" in text


def test_what_was_run_is_said(text: str) -> None:
    read = Read(text)
    assert read.row("state") == ["complete, 7 failed"]
    assert read.row("options that differ from the defaults") == ["slots = 16"]
    assert read.row("model fingerprint") == ["sampled-sha256:0123"]
    assert read.row("hosts") == ["node0, node1"]
    assert read.row("seed") == ["5"]
    assert "mpirun -n 3 llmpi batch -o" in read.text


def test_steals_are_told_where_there_are_any(run: Path, text: str, tmp_path: Path) -> None:
    line = view(run).timeline
    assert line is not None
    stolen = line.lanes[2].stolen_in
    assert stolen > 0
    assert f"{stolen} of them stolen" in Read(text).text
    assert "A triangle is where stolen requests arrived" in Read(text).text
    assert "stolen requests came" in Read(text).words, "what the marks are, in the picture"
    alone = made(make_run(tmp_path / "alone", 5, ranks=1, gpu=False))
    assert "A triangle is where" not in alone
    assert "stolen requests came" not in alone


def marks(text: str) -> list[tuple[str, str]]:
    """Fill and edge of each mark in the lanes of ranks, the legend's included."""
    picture = next(one for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "gantt-0" in one)
    styles = [attributes.get("style") or "" for tag, attributes in Read(picture).tags if tag == "use"]
    found = [re.fullmatch(r"fill: var\(--(\w+)\); stroke: var\(--(\w+)\).*", style) for style in styles]
    return [(one[1], one[2]) for one in found if one]


def test_copies_are_drawn_where_they_started_won_ones_filled_and_told(tmp_path: Path) -> None:
    """In the colour of the rank that was slow: the second of three."""
    copies = [(3, 2, 5.0, 1), (3, 2, 5.5, 0), (1, 2, 5.2, -1)]
    text = made(make_run(tmp_path / "copied", 60, ranks=3, gpu=False, copies=copies))
    said = Read(text)
    assert (
        "rank 3: busy 75 %, 20 requests, 0 of them stolen, 2 copies of stragglers started, 1 answered first"
        in said.text
    )
    assert (
        "rank 1: busy 75 %, 20 requests, 0 of them stolen, 1 copy of stragglers started, 0 answered first" in said.text
    )
    assert "A diamond is where a copy of a straggler was started" in said.text
    assert "3 copied" in said.text
    assert {"copy, answered first", "copy, in vain"} <= set(said.words)
    without = marks(made(make_run(tmp_path / "plain", 60, ranks=3, gpu=False)))
    drawn = marks(text)
    for one in without:
        drawn.remove(one)
    second = "c1"
    lanes = [(second, "paper"), ("paper", second), ("paper", second)]
    assert sorted(drawn) == sorted([*lanes, ("muted", "paper"), ("paper", "muted")])


def test_without_copies_nothing_is_said_of_them(text: str) -> None:
    assert "copied" not in text
    assert "diamond" not in text
    assert "copy, " not in text


def test_a_lost_engine_explains_the_dip_before_its_death(run: Path) -> None:
    whole = view(run)
    ranks = [rank | {"engine_restarts": int(rank["rank"] == 1)} for rank in whole.data["ranks"]]
    told = Read(page([replace(whole, data=whole.data | {"ranks": ranks})], [failure_reasons(run)])).text
    assert "1 engine was lost: what ran then is drawn where it was answered" in told
    assert "engine was lost" not in Read(made(run)).text


def test_percentiles_that_the_count_cannot_support_are_flagged(tmp_path: Path) -> None:
    few = Read(made(make_run(tmp_path / "few", 30)))
    assert re.search(r"P99 [\d.]+ ms \*; 30 samples. \* Too few samples to support P99", few.text)
    assert few.row("TTFT")[2].endswith(" *")


def test_absent_figures_are_said_not_drawn_as_0(tmp_path: Path) -> None:
    killed = make_run(tmp_path / "killed", 20, ended=False)
    show_report([killed], ReportOptions())
    read = Read((killed / "report.html").read_text(encoding="utf-8"))
    assert read.row("state") == ["not complete: the same command resumes it"]
    assert "Busy shares and counters of ranks: not measured" in read.text
    assert "Utilisation, memory and power: not measured" in read.text
    assert "ITL: not measured" in read.text
    assert "What ran when the job died is in no record" in read.text
    assert sum(tag == "svg" for tag, _ in read.tags) == 6, "four latencies, time, ranks: the record has these"
    processor = Read(made(make_run(tmp_path / "cpu", 20, gpu=False)))
    assert "GPU utilisation, memory and power: not measured, no rank had a GPU" in processor.text
    assert "Energy an output token: not measured" in processor.text


def test_counters_that_a_killed_job_did_not_leave_are_told_below_the_table(run: Path) -> None:
    whole = view(run)
    assert "counters:" not in " ".join(ranks_chapter([whole]))
    less = replace(whole, data=whole.data | {"uncounted": 7})
    assert "counters: 7 of 120 recorded requests are in no rank's" in Read(" ".join(ranks_chapter([less]))).text


def test_jobs_are_told_apart_where_none_ended(run: Path) -> None:
    whole = view(run)
    assert "job" not in Read(" ".join(ranks_chapter([whole]))).rows[0]
    ranks = [rank | {"session": session} for session in (0, 2) for rank in whole.data["ranks"]]
    data = whole.data | {"ranks": ranks, "last_session": {}}
    found = Read(" ".join(ranks_chapter([replace(whole, data=data)])))
    assert [row[:2] for row in found.rows] == [["job", "rank"], ["1", "1"], ["1", "2"], ["3", "1"], ["3", "2"]]


def test_names_of_jobs_do_not_overlap(run: Path) -> None:
    whole = view(run)
    assert whole.timeline is not None
    ends_s = whole.timeline.length_s * np.array([0.2, 0.21, 0.22, 0.6])
    line = replace(whole.timeline, breaks_s=dict(enumerate(ends_s.tolist(), 1)))
    drawn = " ".join(ranks_chapter([replace(whole, timeline=line)]))
    assert re.findall(r"job \d", drawn) == ["job 2", "job 5"]


def test_measurements_that_cannot_be_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", 30)
    assert "measurements:" not in made(run_dir) + capsys.readouterr().out
    (segments,) = (run_dir / SEGMENTS_NAME).iterdir()
    content = segments.read_bytes()
    segments.write_bytes(content[:40] + b"ZZZ" + content[43:])
    show_report([run_dir], ReportOptions(rebuild=True))
    told = f"measurements: {len(content):,} bytes in metrics.d are damaged"
    assert told in Read((run_dir / "report.html").read_text(encoding="utf-8")).text
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_without_answers_has_a_page(tmp_path: Path, ended: bool) -> None:
    failed = Read(made(make_run(tmp_path / "failed", 9, failed=9)))
    assert "Not measured: no request was answered" in failed.text
    empty = make_run(tmp_path / "empty", 0, ended=ended)
    show_report([empty], ReportOptions())
    read = Read((empty / "report.html").read_text(encoding="utf-8"))
    assert "nothing has been recorded" in read.text
    assert "nan" not in read.text.lower()


def test_several_runs_stand_side_by_side_with_ratios_to_the_first(run: Path, tmp_path: Path) -> None:
    slower = make_run(tmp_path / "slower", slowness=2.0, gpu=False)
    read = Read(made(run, slower))
    rates = [report_data(path)["output_tokens_per_s"] for path in (run, slower)]
    ratio = rates[1] / rates[0]
    assert read.row("output tokens/s") == [figure_text(rates[0]), f"{figure_text(rates[1])} (×{ratio:.2f})"]
    assert read.row("") == ["one", "slower"]
    assert "TTFT: P95 is least with one" in read.text
    assert read.row("J an output token")[1] == "-"


def test_runs_of_the_same_name_are_told_apart_by_their_paths() -> None:
    paths = [Path("/a/run"), Path("/b/run"), Path("/b/other")]
    assert names_of(paths) == ["/a/run", "/b/run", "other"]


def test_many_ranks_and_devices_still_make_a_page(tmp_path: Path) -> None:
    text = made(make_run(tmp_path / "wide", 2_000, ranks=100))
    assert len(text) < 2e6
    assert f"{LANES_MAX} of 100 ranks are drawn" in Read(text).text
    assert "Of 100 devices the mean is drawn, and the range" in Read(text).text


def test_the_page_does_not_grow_with_the_requests(tmp_path: Path) -> None:
    """A tenth of a million fills each of its bins with fifty: there is nothing more to draw of more."""
    path = make_run(tmp_path / "large", 10, ranks=4)
    count, random = 100_000, np.random.default_rng(1)
    table = np.zeros(count, REQUEST)
    table["rank"], table["ok"], table["output_tokens"] = 1 + np.arange(count) % 4, 1, 50
    table["e2e_s"] = random.lognormal(1, 1, count)
    table["end_s"] = table["e2e_s"] + np.arange(count) / 25
    table["ttft_s"], table["queue_s"] = table["e2e_s"] / 5, table["e2e_s"] / 9
    table["tpot_s"] = table["e2e_s"] / 60
    table["stolen_from"] = np.where(random.random(count) < 0.3, 1, -1)
    ranks = np.zeros(4, RANK)
    ranks["rank"] = np.arange(1, 5)
    samples = np.concatenate([telemetry(4_000, rank) for rank in range(1, 5)])
    parts = np.array_split(table, 4)
    write_metrics(path / METRICS_NAME, parts, ranks, {"itl": LogHistogram()}, samples, {"wall_s": 4_100.0})
    text = made(path)
    assert len(text.encode()) < 1e6
    assert Read(text).row("TTFT")[-1] == "100,000"


# ---------------------------------------------------------------- the command


def test_matplotlib_is_imported_when_a_picture_is_made_and_not_before() -> None:
    code = "import coordinator.cli, coordinator.page.document, coordinator.reporting, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "coordinator.page.svg" in done.stdout.split()
    assert not {"matplotlib", "mpi4py", "llama_cpp", "pyarrow"} & set(done.stdout.split())


def test_without_matplotlib_tables_are_printed_and_one_line_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert show_report([run], ReportOptions()) == 0
    said = capsys.readouterr()
    assert "113 answered, 7 failed" in said.out
    assert said.err == f"llmpi: {NEEDS}\n"
    with pytest.raises(ConfigError, match=r"pip install 'llmpi\[report\]'"):
        show_report([run], ReportOptions(html=tmp_path / "page.html"))


def test_the_page_goes_where_it_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coordinator.page.document.page", lambda views, reasons: f"{len(views)} & {len(reasons)}")
    monkeypatch.chdir(tmp_path)
    (run / "report.html").unlink(missing_ok=True)
    show_report([run], ReportOptions(no_html=True))
    show_report([run], ReportOptions(as_json=True))
    assert not (run / "report.html").exists()
    show_report([run], ReportOptions())
    assert (run / "report.html").exists()
    show_report([run, run], ReportOptions())
    show_report([run], ReportOptions(html=tmp_path / "own.html"))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"own.html": "1 & 1", "report.html": "2 & 2"}
    capsys.readouterr()
    with pytest.raises(ConfigError, match="cannot write"):
        show_report([run], ReportOptions(html=tmp_path / "no" / "page.html"))


def test_where_nothing_can_be_written_the_tables_are_printed_and_a_line_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another's run directory, or one on a disk that is mounted read-only: there a file cannot even be removed."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("coordinator.page.document.page", lambda *_: "page")
    for name in ("write_text", "unlink"):
        monkeypatch.setattr(Path, name, refused)
    assert show_report([run], ReportOptions()) == 0
    said = capsys.readouterr()
    assert "113 answered, 7 failed" in said.out
    assert (
        said.err
        == f"llmpi: cannot write {run}/report.html: Read-only file system. Give another place with --html FILE\n"
    )


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (1, {"html": Path("x"), "no_html": True}, "exclude each other"),
        (9, {}, "too many"),
        (2, {"show": 1}, "one run"),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Path, count: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        show_report([run] * count, ReportOptions(**options))


def test_metrics_are_made_anew_where_asked(run: Path) -> None:
    (run / METRICS_NAME).write_bytes(b"damaged")
    show_report([run], ReportOptions(rebuild=True, no_html=True))
    assert report_data(run)["requests"] == 120
