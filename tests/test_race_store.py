"""The store: whole files or none, damage noticed, one race at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_studies import plain_study

from piste.race import environment
from piste.race import store as store_module
from piste.race.canonical import plain
from piste.race.record import RecordError, RunRecord
from piste.race.store import Store, StoreError

RECORDS = plain_study().records


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "race")


def _filled(store: Store, count: int = 3) -> list[RunRecord]:
    with store.writing():
        for record in RECORDS[:count]:
            store.add(record)
    return RECORDS[:count]


def test_plain_data_are_those_of_the_dataclasses() -> None:
    """Nothing is copied but what has a number that JSON has no sign for."""
    study = plain_study()
    whole = study.records[0].curve.valid_loss
    study.records[1].curve.valid_loss[-1] = math.nan
    study.records[1].curve.gradient_norm[:] = [1e308, 1e308, -math.inf]

    def named(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
        if isinstance(value, dict):
            return {name: named(item) for name, item in value.items()}
        return [named(item) for item in value] if isinstance(value, (list, tuple)) else value

    found = plain(study)
    assert json.loads(json.dumps(found, allow_nan=False)) == named(asdict(study))
    assert found["records"][0]["curve"]["valid_loss"] is whole


def test_records_come_back_as_they_went(store: Store) -> None:
    records = _filled(store)
    found = store.load()
    assert {id_: r.to_json() for id_, r in found.items()} == {r.key.id: r.to_json() for r in records}
    assert sorted(path.name for path in store.runs.iterdir()) == sorted(f"{r.key.id}.json" for r in records)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_flipped_bit_is_noticed(store: Store, place: float) -> None:
    records = _filled(store)
    victim = store.runs / f"{records[1].key.id}.json"
    content = bytearray(victim.read_bytes())
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    content[digits[int(place * len(digits))]] ^= 1
    victim.write_bytes(content)
    found = store.load()
    assert set(found) == {records[0].key.id, records[2].key.id}
    assert "is damaged" in store.damaged[0]
    assert str(victim) in store.damaged[0]
    assert not victim.exists()
    assert victim.with_name(victim.name + ".damaged").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"checksum": 1}', "\x00" * 100])
def test_what_is_no_record_is_set_aside(store: Store, text: str) -> None:
    _filled(store)
    (store.runs / "feedfeedfeedfeedfeed.json").write_text(text)
    assert len(store.load()) == 3
    assert len(store.damaged) == 1


def test_a_record_under_another_name_is_set_aside(store: Store) -> None:
    records = _filled(store)
    path = store.runs / f"{records[0].key.id}.json"
    path.rename(path.with_name("0" * 20 + ".json"))
    assert len(store.load()) == 2
    assert "its name is not its id" in store.damaged[0]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"), Store(tmp_path / "file" / "race").writing():
        pass


def test_a_full_disk_keeps_what_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(store)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.writing():
        monkeypatch.setattr(store_module.os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left.*free some space.*3 finished runs in it are kept"):
            store.add(RECORDS[5])
        monkeypatch.undo()
    assert len(store.load()) == 3
    assert store.damaged == []
    assert not list(store.path.rglob("*.tmp"))


LIMITED = """
import resource, signal, sys
from pathlib import Path
from piste.race.store import Store, StoreError
from report_studies import plain_study
records = plain_study().records
store = Store(Path(sys.argv[1]))
with store.writing():
    store.add(records[0])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    try:
        store.add(records[1])
    except StoreError as error:
        print(error)
print(len(store.load()), store.damaged, sorted(path.suffix for path in store.runs.iterdir()))
"""


def test_a_file_that_the_system_cuts_off_is_never_a_record(store: Store) -> None:
    """For real this time: the system refuses to let a file grow beyond a part of a record."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(store.path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    refusal, left = done.stdout.splitlines()
    assert "can no longer be written: File too large; free some space" in refusal
    assert "the 1 finished runs in it are kept" in refusal
    assert left == "1 [] ['.json']"


def test_a_changed_byte_is_noticed_wherever_it_is(store: Store) -> None:
    """Each byte of a record in turn, by any change from one bit to all of them: it is never read."""
    record = _filled(store, 1)[0]
    path = store.runs / f"{record.key.id}.json"
    content = path.read_bytes()
    draw = random.Random(0)
    assert RunRecord.from_json(content.decode()).to_json() == record.to_json()
    for place, byte in enumerate(content):
        changed = content[:place] + bytes([byte ^ draw.randint(1, 255)]) + content[place + 1 :]
        with pytest.raises((RecordError, UnicodeDecodeError)):
            RunRecord.from_json(changed.decode())
    # what reading it as text would take for the same line break
    path.write_bytes(content.replace(b"\n", b"\r", 1))
    assert store.load(set_aside=False) == {}


@given(data=st.data())
@settings(max_examples=300)
def test_no_damage_of_an_older_record_is_read_as_something_else(data: st.DataObject) -> None:
    """Those of schema 2 have their checksum over the content: spaces may change, what is read may not."""
    record = RECORDS[0]
    content = {**json.loads(record.to_json()), "schema": 2}
    del content["checksum"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    text = bytearray(json.dumps(content, indent=1).encode())
    intact = RunRecord.from_json(text.decode())
    assert (intact.key, intact.curve) == (record.key, record.curve)
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read = RunRecord.from_json(text.decode())
    except (RecordError, UnicodeDecodeError):
        return
    assert read.to_json() == intact.to_json()


def test_a_run_does_not_overwrite_another(store: Store) -> None:
    """Different keys have different ids, equal ones the same, whatever the order of their fields."""
    ids = {record.key.id for record in RECORDS}
    assert len(ids) == len({repr(record.key) for record in RECORDS}) == len(RECORDS)
    key = RECORDS[0].key
    turned = dict(reversed(key.versions.items()))
    assert list(turned) != list(key.versions)
    assert replace(key, versions=turned).id == key.id
    for change in ({"seed": 99}, {"steps": 251}, {"task_hash": "0"}, {"phase": "?"}, {"hyperparameters": {"lr": 1.0}}):
        assert replace(key, **change).id != key.id  # type: ignore[arg-type]


def test_leftovers_of_a_killed_writer_are_swept(store: Store) -> None:
    _filled(store)
    (store.runs / "half.json.tmp").write_text("{")
    with store.writing():
        assert len(store.load()) == 3
    assert not list(store.path.rglob("*.tmp"))


HOLDER = """
import sys, time
from pathlib import Path
from piste.race.store import Store
with Store(Path(sys.argv[1])).writing():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_race_is_refused_until_the_first_dies(store: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(store.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=rf"another race is using .*process {holder.pid}.*--out"), store.writing():
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with store.writing():
            assert store.load() == {}
    finally:
        holder.kill()
        holder.communicate()


def test_no_study_is_said(store: Store) -> None:
    with pytest.raises(StoreError, match="there is no race in"):
        store.read_study()
    store.path.mkdir()
    store.study.write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        store.read_study()


def test_whatever_works_out_gradients_counts_into_the_version_of_records() -> None:
    """A run is not made again while its code is the same; probes and tasks have hashes of their own."""
    folder = Path(environment.__file__).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    training = {name for name, text in texts.items() if "autograd.grad(" in text or ".backward(" in text}
    assert {"stack.py", "training.py"} <= training
    assert training - {"inspection.py"} <= {Path(name).name for name in environment._DECISIVE}
    assert all((folder.parent / name).is_file() for name in environment._DECISIVE)
