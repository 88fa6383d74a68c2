"""The report says what the receipts say, the same in three formats, safely, in one small file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.optimize import receipts
from snello.report import numbers
from snello.report.html import POLICY
from snello.report.write import write_report
from tests.report import samples

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = samples.write(tmp_path_factory.mktemp("lean"))
    write_report(folder)
    return folder


class Reader(HTMLParser):
    """Visible text without the drawings; also counts tags."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"svg", "style", "head"} & set(self.open):
            self.text.append(data)


def read_html(folder: Path) -> Reader:
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    assert not reader.open
    return reader


def numbers_in(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


def json_texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in json_texts(item)]


def test_every_number_is_the_same_in_html_markdown_and_json(folder: Path) -> None:
    page = numbers_in(" ".join(read_html(folder).text))
    markdown = numbers_in((folder / "report.md").read_text())
    sections = json.loads((folder / "report.json").read_text())["sections"]
    data = numbers_in(" ".join(text for section in sections for text in json_texts(section)))
    assert set(page) == set(markdown) == set(data)
    assert len(page) > 100


def test_the_numbers_are_those_of_the_receipts(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    proof, run = samples.proof(), samples.run()
    assert proof.sentence.split(";")[0] in text
    for row in samples.rows():
        if row.loss is not None:
            assert numbers.loss(row.loss) in text
        if row.speedup is not None:
            assert numbers.times_interval(row.speedup) in text
    for expected in (
        "61,204",
        "1.19 GB",
        "352 MB",
        run.model.digest,
        run.text_sha256,
        "96.9%",
        "13.2 times",
        "14.3312",
        "python verify.py ORIGINAL hf",
        run.replay,
    ):
        assert expected in text, expected
    assert json.loads((folder / "report.json").read_text())["proof"]["sentence"] == proof.sentence


def test_the_sections_stand_in_the_order_of_doubt(folder: Path) -> None:
    keys = [section["key"] for section in json.loads((folder / "report.json").read_text())["sections"]]
    assert keys == ["claim", "worst", "ladder", "controls", "pareto", "speed", "quality", "check", "method"]


def test_dropped_and_not_run_stages_are_on_the_ladder(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "dropped: over 1%" in text
    assert "not run: cannot pay at 640 tokens" in text


def test_the_page_can_call_nobody(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert POLICY in page
    assert not {"script", "img", "link", "iframe", "object"} & set(read_html(folder).tags)
    assert "://" not in page and "<script" not in page and "url(" not in page
    assert "&lt;script&gt;" in page


def test_drawings_are_well_formed_and_described(folder: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert [child.tag for child in root][:2] == ["title", "desc"]


def test_the_file_is_small(folder: Path) -> None:
    assert (folder / "report.html").stat().st_size < 300_000


def test_the_same_receipts_give_the_same_bytes(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_a_run_without_a_proof_claims_nothing(tmp_path: Path) -> None:
    write_report(samples.write(tmp_path, proved=False))
    text = (tmp_path / "report.md").read_text()
    assert "nothing is claimed" in text and "not run: cannot pay" in text


def test_a_folder_without_receipts_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="no receipts"):
        write_report(tmp_path)


def test_verify_is_short_and_comes_with_its_windows(folder: Path) -> None:
    (folder / "proof.json").write_text("{}")
    write_report(folder)
    script = (folder / "verify.py").read_text()
    compile(script, "verify.py", "exec")
    assert len(script.splitlines()) <= 40
    assert "snello." not in script and "import snello" not in script


def test_a_pair_is_original_then_lean(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "| pair | original | lean |" in text and "| 1 | 5.71 s | 1.89 s |" in text
    assert "pair 1: 0.331" in (folder / "report.html").read_text()


def test_the_tokens_that_lost_are_named_and_shaded(folder: Path) -> None:
    evil = samples.proof().worst[0].tokens[2]
    assert [block["peaks"] for block in section(folder, "worst")["blocks"] if block["kind"] == "excerpt"] == [
        f'Most at "{evil}" (2.20, then 5.40), " area" (0.40, then 0.60), "    return" (1.10, then 1.30)'
    ]
    assert (folder / "report.html").read_text().count("<mark>") == 1


def test_what_is_wide_scrolls_by_itself_and_by_keyboard(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    wide = page.count("<table>") + page.count("<svg ")
    assert wide == page.count('<div class="scroll" tabindex="0" role="region" aria-label="')


def test_a_ceiling_that_was_beaten_is_called_too_low(tmp_path: Path, folder: Path) -> None:
    beaten = dataclasses.replace(samples.speed(23.1), ceiling_decode_tokens_per_second=20.0)
    sample = dataclasses.replace(samples.proof(), speed_original=beaten)
    receipts.write(samples.write(tmp_path) / "receipts", 7, "proof", sample)
    write_report(tmp_path)
    assert "that ceiling is too low" in (tmp_path / "report.md").read_text()
    assert "that ceiling is too low" not in (folder / "report.md").read_text()


def test_a_run_that_kept_nothing_is_not_called_lean(tmp_path: Path) -> None:
    kept = dataclasses.replace(
        samples.proof(),
        sentence="keep your model",
        artifact_sha256=None,
        perplexity=None,
        pareto=(),
        worst=(),
        files={},
    )
    receipts.write(samples.write(tmp_path) / "receipts", 7, "proof", kept)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Qwen3-0.6B, left as it is") and "verify.py" not in text
    assert "No candidate but the original was measured." in text and "No passages were kept" in text


def test_a_loss_without_a_bound_is_written_and_drawn(tmp_path: Path) -> None:
    unbounded = dataclasses.replace(
        samples.rows()[4], verdict="cannot tell", loss=Interval(-math.inf, 0.004, math.inf), speedup=None
    )
    proof = dataclasses.replace(samples.proof(), ladder=(*samples.rows()[:4], unbounded))
    receipts.write(samples.write(tmp_path) / "receipts", 7, "proof", proof)
    write_report(tmp_path)
    assert "0.40% (no bound)" in (tmp_path / "report.md").read_text()
    assert not re.search(r"\d{12}|\binf|nan", re.sub(r"[0-9a-f]{64}", "", (tmp_path / "report.html").read_text()))


def test_markdown_shows_markup_as_text(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert r"\<script\>" in text and "<script>" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def section(folder: Path, key: str) -> dict[str, Any]:
    sections = json.loads((folder / "report.json").read_text())["sections"]
    found: dict[str, Any] = next(section for section in sections if section["key"] == key)
    return found
