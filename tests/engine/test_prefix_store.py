"""Prefixes on disk: the same bytes with and without them, whatever happens to the files."""

from __future__ import annotations

import dataclasses
import errno
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.engine import page_files
from snello.engine.engine import Engine
from snello.engine.llm import LLM
from snello.engine.lookup import Lookup
from snello.engine.page_files import HEADER, PageFiles
from snello.engine.pages import GONE
from snello.engine.prefix import PAGE
from snello.engine.prefix_store import PrefixStore, PrefixStoreOptions, fingerprint_of
from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.engine.test_engine import AllThatIsGuessed, Recorder, collect, model_of, said

CONTEXT = 512
SAY = SamplingParams(max_tokens=5, temperature=0, logprobs=2, ignore_eos=True)
LENGTHS = (127, 128, 129, 255, 256, 257, 384, 500)  # around whole pages, and on them


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
    core.select_isa(None)


@pytest.fixture(scope="module", params=["llama", "mistral-window", "int4, int8 cache"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param in ("llama", "mistral-window"):
        return model_of(request.param, tmp_path_factory.getbasetemp())
    calib = [np.random.default_rng(0).integers(1, 300, 100).astype(np.int32)]
    context = Context(output=tmp_path_factory.mktemp("lean") / "lean", windows=calib)
    return Quantize(cache="int8").apply(model_of("llama", tmp_path_factory.getbasetemp()), context)


def prompts(seed: int = 5) -> list[list[int]]:
    text = np.random.default_rng(seed).integers(20, 300, 600).tolist()
    return [text[:length] for length in LENGTHS]


class Willing(PrefixStore):
    """Reads always: whether that pays depends on how busy the machine is."""

    def _pays(self, *_: object) -> bool:
        return True


class Run:
    """What an engine says to prompts, one after the other or at once, and the bytes of the logits behind it."""

    def __init__(
        self,
        model: Model,
        folder: Path | None,
        wanted: Sequence[list[int]],
        *,
        audit: float = 0.0,
        salt: str = "",
        limit_bytes: int = 10**9,
        pays: bool = True,
    ) -> None:
        with Recorder(model, Deployment(context=CONTEXT, threads=1, streams=4)) as executor:
            store = None
            if folder is not None:
                options = PrefixStoreOptions(folder=folder, audit=audit, limit_bytes=limit_bytes)
                kind = Willing if pays else PrefixStore
                store = kind(fingerprint_of(executor), executor, options, seed=1)
                store._ms_per_mb = 1e9
            engine = Engine(executor, model.tokenizer, store=store)
            self.said = []
            for prompt in wanted:
                request = engine.add(prompt, SAY, salt=salt)
                chunks = []
                while engine.has_work:
                    chunks += [chunk for number, chunk in engine.step() if number == request]
                self.said.append(said(chunks))
                engine.clear_cache()  # memory forgets: only the disk can know
            executor.pages.check()
            assert executor.pages.num_held == 0
            self.seen, self.rows, self.cached = executor.seen, executor.rows, engine.counters.cached_tokens
            if store is not None:
                store.close()
                self.counters, self.files, self.bypassed = store.counters, store.files.counters, store.bypassed
                self.total_bytes = store.files.total_bytes


def check_equal(run: Run, truth: Run) -> None:
    """The same answers, and the same bytes of logits wherever both had some."""
    assert run.said == truth.said
    common = run.seen.keys() & truth.seen.keys()
    assert len(common) >= 5 * len(truth.said) and all(run.seen[key] == truth.seen[key] for key in common)


def test_with_and_without_are_equal_to_the_byte(model: Model, tmp_path: Path) -> None:
    truth = Run(model, None, prompts())
    first, again = Run(model, tmp_path, prompts()), Run(model, tmp_path, prompts())
    for run in (first, again):
        check_equal(run, truth)
    assert first.files.written > 0 and first.files.damaged == 0
    whole = sum((length - 1) // PAGE * PAGE for length in LENGTHS)
    assert again.counters.hit > 0 and again.cached == whole, "after a restart every whole page was known"
    assert again.rows == truth.rows - whole, "and was not computed"


def test_many_at_once_and_little_memory(model: Model, tmp_path: Path) -> None:
    Run(model, tmp_path, prompts())
    truth = Run(model, None, prompts())
    with Recorder(model, Deployment(context=CONTEXT, threads=1, streams=4)) as executor:
        store = PrefixStore(fingerprint_of(executor), executor, PrefixStoreOptions(folder=tmp_path, audit=0))
        store._ms_per_mb = 1e-9
        taken = [executor.pages.allocate() for _ in range(executor.pages.num_free - 5)]
        engine = Engine(executor, model.tokenizer, store=store)
        chunks = collect(engine, [(prompt, SAY) for prompt in prompts()])
        assert [said(each) for each in chunks] == truth.said
        assert store.counters.hit > 0 and not store._states
        executor.pages.free(taken)
        executor.pages.check()
        assert executor.pages.num_held == 0
        store.close()


def test_beside_guesses(model: Model, tmp_path: Path) -> None:
    """What is guessed and wrong is never kept: only computed positions of known tokens are."""
    passage = np.random.default_rng(8).integers(20, 300, 60).tolist()
    wanted = [(passage * 3, dataclasses.replace(SAY, max_tokens=120)) for _ in range(3)]
    truth: list[list[object]] | None = None
    for turn in range(3):
        with Recorder(model, Deployment(context=CONTEXT, threads=1, streams=4)) as executor:
            options = PrefixStoreOptions(folder=tmp_path, audit=0.5)
            store = Willing(fingerprint_of(executor), executor, options, seed=turn)
            engine = Engine(executor, model.tokenizer, drafter=Lookup(past=True), store=store if turn else None)
            engine.governor = AllThatIsGuessed()
            for request in wanted:
                said_now = [said(chunks) for chunks in collect(engine, [request])]
                truth = truth or said_now
                assert said_now == truth
                engine.clear_cache()
            assert engine.governor.proposed > 0 and store.counters.mismatched_pages == 0
            assert turn == 0 or store.files.counters.written + store.counters.hit > 0
            store.close()


def test_nothing_is_shared_between_salts_or_models(model: Model, tmp_path: Path) -> None:
    Run(model, tmp_path, prompts()[-1:], salt="one")
    other = Run(model, tmp_path, prompts()[-1:], salt="two")
    assert other.counters.queried > 0 and other.counters.hit == 0 and other.files.written > 0


def test_a_fingerprint_is_of_weights_spec_and_numerics(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(model, Deployment(context=CONTEXT, threads=1)) as executor:
        found = {fingerprint_of(executor)}
        with Recorder(model, Deployment(context=128, threads=1, chunk_rows=7)) as other:
            assert fingerprint_of(other) in found, "how it is run here changes nothing"
        executor.spec = dataclasses.replace(executor.spec, bos_token=5)
        found.add(fingerprint_of(executor))
        executor.page_bytes += 64
        found.add(fingerprint_of(executor))
        monkeypatch.setattr(core, "NUMERICS_VERSION", core.NUMERICS_VERSION + 1)
        found.add(fingerprint_of(executor))
        executor.model = dataclasses.replace(model, files=())
        found.add(fingerprint_of(executor))
    assert len(found) == 5


@pytest.mark.parametrize("where", ["magic", "fingerprint", "key", "counts", "checksum", "tokens", "first", "last"])
def test_a_flipped_bit_is_never_used(model: Model, tmp_path: Path, where: str) -> None:
    truth = Run(model, tmp_path, prompts()[4:5])
    places = {"magic": 0, "fingerprint": 9, "key": 50, "counts": 73, "checksum": HEADER.size - 1, "tokens": HEADER.size}
    places |= {"first": HEADER.size + 4 * PAGE, "last": -1}
    for path in tmp_path.rglob("*.kv"):
        content = bytearray(path.read_bytes())
        content[places[where]] ^= 16
        path.write_bytes(content)
    again = Run(model, tmp_path, prompts()[4:5])
    check_equal(again, truth)
    assert again.files.damaged > 0 and again.counters.hit == 0
    assert Run(model, tmp_path, prompts()[4:5]).counters.hit > 0, "good ones took their place"


@pytest.mark.parametrize("length", [0, 10, HEADER.size, HEADER.size + 5000])
def test_a_torn_file_is_never_used(model: Model, tmp_path: Path, length: int) -> None:
    truth = Run(model, tmp_path, prompts()[4:5])
    for path in tmp_path.rglob("*.kv"):
        os.truncate(path, length)
    again = Run(model, tmp_path, prompts()[4:5])
    check_equal(again, truth)
    assert again.files.damaged > 0


def test_files_that_vanish_are_a_miss(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Run(model, tmp_path, prompts()[-1:])
    monkeypatch.setattr(PageFiles, "__contains__", lambda self, key: True)
    for path in tmp_path.rglob("*.kv"):
        path.unlink()
    again = Run(model, tmp_path, prompts()[-1:])
    check_equal(again, truth)
    assert again.counters.hit == 0


# ---- the auditor ----------------------------------------------------------------------------------------------------


def lie(model: Model, folder: Path) -> None:
    """Puts other bytes into every file, with checksums that agree."""
    for path in folder.rglob("*.kv"):
        content = path.read_bytes()
        start, rest = content[: HEADER.size - 32], bytearray(content[HEADER.size :])
        for at in range(4 * PAGE, len(rest), 2):
            rest[at] ^= 1
        path.write_bytes(start + page_files._checksum(start, bytes(rest)) + rest)


def test_audits_find_nothing_where_nothing_is_wrong(model: Model, tmp_path: Path) -> None:
    truth = Run(model, tmp_path, prompts())
    audited = Run(model, tmp_path, prompts(), audit=1.0)
    check_equal(audited, truth)
    assert audited.counters.audited_pages > 3 and audited.counters.mismatched_pages == 0
    assert audited.counters.hit == 0 and not audited.bypassed


def test_an_audit_finds_a_file_that_lies_and_ends_the_use_of_all(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = Run(model, tmp_path, prompts()[5:6])
    lie(model, tmp_path)
    unnoticed = Run(model, tmp_path, prompts()[5:6])
    common = unnoticed.seen.keys() & truth.seen.keys()
    assert any(unnoticed.seen[key] != truth.seen[key] for key in common), "files are really used"
    audited = Run(model, tmp_path, prompts()[5:6], audit=1.0)
    check_equal(audited, truth)
    assert audited.counters.mismatched_pages == 1 and audited.bypassed
    later = Run(model, tmp_path, prompts()[5:6])
    check_equal(later, truth)
    assert later.bypassed and later.counters.hit == 0 and "not used" in caplog.text


def test_a_share_of_hits_is_audited(model: Model, tmp_path: Path) -> None:
    text = prompts()[4]
    Run(model, tmp_path, [text])
    run = Run(model, tmp_path, [[*text, 20 + number] for number in range(60)], audit=0.2)
    assert 4 <= run.counters.audited_hits <= 22 and run.counters.hit >= 38 * PAGE


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    def put(files: PageFiles, number: int) -> None:
        files.put(bytes([number]) * 32, array("i", [number] * PAGE), np.full(5000, number, np.uint8))
        files.flush()

    one_file = HEADER.size + 4 * PAGE + 5000
    files = PageFiles(tmp_path, b"f" * 32, 5000, 3 * one_file + 10)
    for number in range(3):
        put(files, number)
    assert files.get(bytes(32), array("i", [0] * PAGE)) is not None  # used: 1 is the oldest now
    put(files, 3)
    assert [bytes([number]) * 32 in files for number in range(4)] == [True, False, True, True]
    assert files.total_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) == 3 * one_file
    files.close()
    other = PageFiles(tmp_path, b"g" * 32, 5000, 3 * one_file + 10)  # another model: the bound holds for both
    assert other.total_bytes == 3 * one_file and bytes(32) not in other
    put(other, 7)
    assert len(list(tmp_path.rglob("*.kv"))) == 3
    other.close()


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "ab"
    folder.mkdir(parents=True)
    dead, alive = folder / "1.kv.999999999.partial", folder / f"1.kv.{os.getpid()}.partial"
    for path in (dead, alive):
        path.write_bytes(b"half")
    PageFiles(tmp_path, b"f" * 32, 5000, 10**6)
    assert not dead.exists() and alive.exists()


def test_a_full_disk_costs_no_answer(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Run(model, None, prompts())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page_files.os, "replace", full)
    run = Run(model, tmp_path, prompts())
    check_equal(run, truth)
    assert run.files.failed >= 1 and run.files.written == 0 and not list(tmp_path.rglob("*.partial"))


def test_reading_that_does_not_pay_is_not_done(model: Model, tmp_path: Path) -> None:
    truth = Run(model, tmp_path, prompts())
    slow = Run(model, tmp_path, prompts(), pays=False)
    check_equal(slow, truth)
    assert slow.counters.hit == 0 and slow.counters.unpaid > 0


def test_files_are_their_owners_alone(model: Model, tmp_path: Path) -> None:
    Run(model, tmp_path / "pages", prompts()[4:5])
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "pages").rglob("*")}
    assert modes == {0}


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    for wrong in ({"limit_bytes": 0}, {"audit": 1.5}, {"audit": -0.1}):
        with pytest.raises(SnelloError, match="audit"):
            PrefixStoreOptions(folder=tmp_path, **wrong)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SnelloError, match="cannot hold pages"),
        LLM("demo", prefixes=PrefixStoreOptions(folder=tmp_path / "file")),
    ):
        pass


# ---- the layout -----------------------------------------------------------------------------------------------------


def test_pages_are_the_same_on_every_instruction_set(model: Model) -> None:
    found = set()
    for isa in core.available_isas():
        with (
            Recorder(model, Deployment(context=CONTEXT, threads=1, isa=isa)) as executor,
            executor.session() as session,
        ):
            session.feed(prompts()[4])
            kept = [page for page in session.pages[:2] if page != GONE]  # a window leaves the second
            assert kept
            found.add(b"".join(executor.page(page).tobytes() for page in kept))
    core.select_isa(None)
    assert len(found) == 1


def test_a_model_that_answers_keeps_prefixes(tmp_path: Path) -> None:
    text = "def answer(request):\n    return request\n" * 20
    options = PrefixStoreOptions(folder=tmp_path, audit=0)
    outputs = []
    for prefixes in (None, options, options):
        with LLM("demo", threads=1, context=CONTEXT, prefixes=prefixes) as llm:
            if llm.store is not None:
                llm.store._ms_per_mb = 1e-9
            outputs.append(llm.generate(text, max_tokens=8, temperature=0))
    assert len({output.token_ids for output in outputs}) == 1
    assert outputs[1].usage.cached_tokens == 0 and outputs[2].usage.cached_tokens >= PAGE
