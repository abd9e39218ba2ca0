"""Downloads from a server on this machine: whole and right, or not at all, whatever the server does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from file_server import FileServer
from filelock import FileLock
from processes import heeding_ctrl_c

from pathfm import Cohort, InputError
from pathfm import download as download_module
from pathfm.__main__ import main
from pathfm.fetch import fetch, read_token

ROOT = Path(__file__).resolve().parent.parent
CONTENT = np.random.default_rng(0).bytes(2**19)  # halves of it end where chunks do
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_module, "BACKOFF_S", 0.01)
    server = FileServer()
    server.files["/a.svs"] = CONTENT
    yield server
    server.close()


def partial_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".*.partial"))


def test_a_file_by_its_address(server, tmp_path):
    found = fetch([f"{server.url}/a.svs"], tmp_path / "slides")
    assert found == [tmp_path / "slides" / "a.svs"]
    assert found[0].read_bytes() == CONTENT
    asked = len(server.requests)
    fetch([f"{server.url}/a.svs"], tmp_path / "slides")
    assert len(server.requests) == asked  # it is there
    assert not partial_files(tmp_path)


@pytest.mark.parametrize("checksum", ["", f"#sha256={SHA}", f"#md5={hashlib.md5(CONTENT).hexdigest().upper()}"])
def test_a_connection_that_drops_is_gone_on_with(server, tmp_path, checksum):
    server.faults["/a.svs"] = ["drop", "drop", "drop"] if checksum else ["drop"]
    (path,) = fetch([f"{server.url}/a.svs{checksum}"], tmp_path, tries=2)
    assert path.read_bytes() == CONTENT
    starts = [int(asked[6:-1]) for asked in server.ranges("/a.svs") if asked]
    assert starts == sorted(set(starts))
    if checksum:
        assert starts == [262_144, 393_216, 458_752]  # three faults and two tries: each brought bytes


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server, tmp_path):
    server.faults["/a.svs"] = ["drop"]
    with pytest.raises(InputError, match=r"1 of 1 files could not be fetched \(a.svs: the connection broke.*run again"):
        fetch([f"{server.url}/a.svs#sha256={SHA}"], tmp_path, tries=1)
    (left,) = partial_files(tmp_path)
    assert left.read_bytes() == CONTENT[:262_144]
    assert not (tmp_path / "a.svs").exists()
    (path,) = fetch([f"{server.url}/a.svs#sha256={SHA}"], tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.ranges("/a.svs") == [None, "bytes=262144-"]
    assert not partial_files(tmp_path)


def test_one_that_had_every_byte_but_not_its_name_is_not_fetched_again(server, tmp_path):
    for address in (f"{server.url}/a.svs#sha256={SHA}", f"{server.url}/a.svs"):
        server.faults["/a.svs"] = ["drop"] if "#" in address else [None, "drop"]
        with pytest.raises(InputError):
            fetch([address], tmp_path, tries=1)
        partial_files(tmp_path)[0].write_bytes(CONTENT)
        server.requests.clear()
        fetch([address], tmp_path)
        assert (tmp_path / "a.svs").read_bytes() == CONTENT
        # With a checksum nothing is asked for; else the ETag, and then 416 says that there is no more.
        assert server.ranges("/a.svs") == ([] if "#" in address else [None, "bytes=524288-"])
        (tmp_path / "a.svs").unlink()


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.ignores_range, server.faults["/a.svs"] = True, ["drop"]
    (path,) = fetch([f"{server.url}/a.svs#sha256={SHA}"], tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.ranges("/a.svs") == [None, "bytes=262144-"]


def test_two_versions_of_a_file_are_never_mixed(server, tmp_path):
    """Without a checksum the ETag tells; without either, a file begins anew."""
    server.faults["/a.svs"] = [None, "drop"]  # the first GET asks for the ETag alone
    with pytest.raises(InputError, match="the connection broke"):
        fetch([f"{server.url}/a.svs"], tmp_path, tries=1)
    assert partial_files(tmp_path)
    other = server.files["/a.svs"] = np.random.default_rng(1).bytes(700_000)
    assert fetch([f"{server.url}/a.svs"], tmp_path)[0].read_bytes() == other
    assert not any(server.ranges("/a.svs"))
    assert not partial_files(tmp_path)
    server.no_etag, server.faults["/a.svs"] = True, [None, "drop", None]
    (tmp_path / "a.svs").unlink()
    assert fetch([f"{server.url}/a.svs"], tmp_path)[0].read_bytes() == other
    assert not any(server.ranges("/a.svs"))


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(InputError, match=rf"a.svs: its sha256 is {SHA} and should be 0000.*nothing of it is kept"):
        fetch([f"{server.url}/a.svs#sha256={'0' * 64}"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".fetch.lock"]
    assert len(server.ranges("/a.svs")) == 2


def test_a_partial_that_is_spoilt_is_fetched_anew(server, tmp_path):
    server.faults["/a.svs"] = ["drop"]
    with pytest.raises(InputError):
        fetch([f"{server.url}/a.svs#sha256={SHA}"], tmp_path, tries=1)
    partial_files(tmp_path)[0].write_bytes(bytes(262_144))
    assert fetch([f"{server.url}/a.svs#sha256={SHA}"], tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("fault", [503, 500, 429, 408])
def test_faults_that_pass_are_waited_out(server, tmp_path, fault):
    server.faults["/a.svs"] = [fault, fault]
    assert fetch([f"{server.url}/a.svs#sha256={SHA}"], tmp_path)[0].read_bytes() == CONTENT
    server.faults["/a.svs"] = [fault] * 9
    with pytest.raises(InputError, match=rf"b.svs: HTTP {fault} .*, 3 times in a row"):
        server.files["/b.svs"], server.faults["/b.svs"] = CONTENT, [fault] * 9
        fetch([f"{server.url}/b.svs#sha256={SHA}"], tmp_path, tries=3)
    assert len(server.ranges("/b.svs")) == 3


def test_what_is_missing_is_named_and_the_others_come(server, tmp_path):
    server.files["/b.svs"] = b"b"
    addresses = [f"{server.url}/{name}.svs" for name in ("none", "a", "b")]
    with pytest.raises(InputError, match=r"1 of 3 files could not be fetched \(none.svs: HTTP 404 Not Found\)"):
        fetch(addresses, tmp_path)
    assert (tmp_path / "a.svs").read_bytes() == CONTENT
    assert (tmp_path / "b.svs").read_bytes() == b"b"
    assert len(server.ranges("/none.svs")) == 1  # 404 stays


def test_nobody_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "BACKOFF_S", 0.01)
    with pytest.raises(InputError, match="a.svs: ConnectionError .*, 2 times in a row"):
        fetch(["http://127.0.0.1:9/a.svs"], tmp_path, tries=2)


def gdc_manifest(server, path, contents: dict[str, bytes], **columns):
    """A manifest whose files the server has under /data/<uuid>."""
    ids = [str(uuid.UUID(int=k + 1)) for k in range(len(contents))]
    for name, content in zip(ids, contents.values(), strict=True):
        server.files[f"/data/{name}"] = content
    md5 = [hashlib.md5(content).hexdigest() for content in contents.values()]
    table = {"id": ids, "filename": list(contents), "md5": md5, "size": [len(c) for c in contents.values()]}
    pd.DataFrame(table | {"state": "released"} | columns).to_csv(path, sep="\t", index=False)
    return ids


NAMES = "TCGA-A7-A0CE-01Z-00-DX1.svs", "TCGA-44-2657-11A-01-BS1.svs"


def test_a_gdc_manifest_on_the_command_line(server, tmp_path, capsys):
    ids = gdc_manifest(server, tmp_path / "m.txt", {NAMES[0]: CONTENT, NAMES[1]: b"two"})
    folder = tmp_path / "slides"
    assert main(["fetch", str(tmp_path / "m.txt"), "--folder", str(folder), "--gdc-url", server.url]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [*(str(folder / ids[k] / NAMES[k]) for k in (0, 1)), str(folder / "cohort.csv")]
    assert (folder / ids[0] / NAMES[0]).read_bytes() == CONTENT
    cohort = Cohort.read(folder / "cohort.csv").table
    assert list(cohort["section"]) == ["FFPE", "frozen"] and list(cohort["source_site"]) == ["A7", "44"]
    assert list(cohort["centre"]) == ["Christiana Healthcare"] * 2 and list(cohort["project"]) == [
        "TCGA-BRCA",
        "TCGA-LUAD",
    ]
    codes = tmp_path / "codes.csv"
    codes.write_text("code,project,centre\nA7,TCGA-BRCA,Christiana\n44,TCGA-LUAD,Christiana\n")
    again = ["fetch", str(tmp_path / "m.txt"), "--folder", str(folder), "--gdc-url", server.url]
    assert main([*again, "--sites", str(codes)]) == 0
    assert list(Cohort.read(folder / "cohort.csv").table["centre"]) == ["Christiana"] * 2
    codes.write_text("code,centre\nA7,Christiana\n")
    asked = len(server.requests)
    assert main([*again, "--sites", str(codes)]) == 2
    assert main(["fetch", f"{server.url}/a.svs", "--folder", str(folder), "--sites", str(codes)]) == 2
    error = capsys.readouterr().err
    assert "codes.csv has no column project" in error and "give it alone, or leave sites out" in error
    assert len(server.requests) == asked


def test_controlled_access_asks_for_a_token_and_no_other_host_sees_it(server, tmp_path, capsys):
    (name,) = gdc_manifest(server, tmp_path / "m.txt", {NAMES[0]: CONTENT})
    server.locked[f"/data/{name}"] = "secret"
    command = ["fetch", str(tmp_path / "m.txt"), "--folder", str(tmp_path / "s"), "--gdc-url", server.url]
    assert main(command) == 2
    assert "HTTP 403 Forbidden: under controlled access; download a token" in capsys.readouterr().err
    (tmp_path / "token").write_text("other\n")
    assert main([*command, "--token-file", str(tmp_path / "token")]) == 2
    assert "the token given does not open it" in capsys.readouterr().err
    (tmp_path / "token").write_text("secret\n")
    assert main([*command, "--token-file", str(tmp_path / "token")]) == 0
    # A redirect to another host, and an address that is not GDC's.
    shutil.rmtree(tmp_path / "s")
    stranger = FileServer()
    stranger.files["/copy"] = CONTENT
    server.elsewhere = f"{stranger.url}/copy".replace("127.0.0.1", "localhost")
    server.faults[f"/data/{name}"] = ["redirect"]
    fetch([str(tmp_path / "m.txt"), f"{stranger.url}/copy"], tmp_path / "s", token="secret", gdc_url=server.url)
    stranger.close()
    assert len(stranger.requests) >= 2
    assert not any("X-Auth-Token" in headers for _, _, headers in stranger.requests)


@pytest.mark.parametrize("text", ["", "two words", None])
def test_token_files_that_hold_none(tmp_path, text):
    if text is not None:
        (tmp_path / "token").write_text(text)
    with pytest.raises(InputError, match=r"token.*download one from GDC's portal"):
        read_token(tmp_path / "token")


def test_openslide_test_data_by_name(server, tmp_path):
    about = {"size": len(CONTENT), "sha256": SHA, "license": "CC0-1.0"}
    listed = {"Aperio/CMU-1-Small-Region.svs": about, "Aperio/CMU-1.svs": about, "Other/CMU-1.svs": about}
    server.files["/index.json"] = json.dumps(listed).encode()
    server.files["/Aperio/CMU-1-Small-Region.svs"] = CONTENT
    found = fetch(["CMU-1-Small-Region.svs"], tmp_path, testdata_url=server.url)
    assert found == [tmp_path / "CMU-1-Small-Region.svs"]
    with pytest.raises(InputError, match="'CMU-1-Smal-Region.svs' is no file here, .*Did you mean 'CMU-1-Small-Region"):
        fetch(["CMU-1-Smal-Region.svs"], tmp_path, testdata_url=server.url)
    with pytest.raises(InputError, match="several of OpenSlide's test data.*Aperio/CMU-1.svs, Other/CMU-1.svs"):
        fetch(["CMU-1.svs"], tmp_path, testdata_url=server.url)
    server.files["/index.json"] = b"<html>"
    with pytest.raises(InputError, match="cannot be listed at .*no JSON"):
        fetch(["CMU-1.svs"], tmp_path, testdata_url=server.url)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (["ftp://a/b.svs"], "no address of a file"),
        (["http://a/"], "no address of a file"),
        (["http://a/b.svs#md5=12"], "ends in no checksum; write #md5= or #sha256="),
        (["http://a/b.svs", "http://c/b.svs"], "b.svs would be fetched twice"),
    ],
)
def test_what_cannot_be_meant(what, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        fetch(what, tmp_path)


def test_a_sample_sheet_has_no_checksums(tmp_path):
    (tmp_path / "s.tsv").write_text(f"File ID\tFile Name\tProject ID\n{uuid.UUID(int=1)}\ta.svs\tTCGA-BRCA\n")
    with pytest.raises(InputError, match="a sample sheet, which has no checksums; give the manifest"):
        fetch([str(tmp_path / "s.tsv")], tmp_path)


def test_a_server_whose_file_has_another_size_than_the_manifest_says(server, tmp_path):
    gdc_manifest(server, tmp_path / "m.txt", {NAMES[0]: CONTENT}, size=[524_289])
    with pytest.raises(InputError, match="has 524288 bytes there and should have 524289"):
        fetch([str(tmp_path / "m.txt")], tmp_path, gdc_url=server.url)


def test_room_is_looked_for_before_anything_comes(server, tmp_path, monkeypatch):
    room = shutil._ntuple_diskusage(10**9, 10**9, 500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(InputError, match=r"has 0.0 GB free and 0.0 GB are to come; free some"):
        fetch([f"{server.url}/a.svs"], tmp_path)
    assert not server.ranges("/a.svs")


def test_a_disk_that_fills_meanwhile_stops_everything_and_keeps_what_came(server, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    server.files |= {f"/{k}.svs": CONTENT for k in range(20)}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left while fetching .*svs; free some and run again to go on"):
        fetch([f"{server.url}/{k}.svs#sha256={SHA}" for k in range(20)], tmp_path, parallel=1)
    assert len(partial_files(tmp_path)) == 1
    monkeypatch.undo()
    assert len(fetch([f"{server.url}/{k}.svs#sha256={SHA}" for k in range(20)], tmp_path)) == 20


def test_two_at_once_do_not_write_the_same_files(server, tmp_path):
    with FileLock(tmp_path / ".fetch.lock"), pytest.raises(InputError, match="another fetch is filling"):
        fetch([f"{server.url}/a.svs"], tmp_path)
    assert fetch([f"{server.url}/a.svs"], tmp_path)


def test_a_folder_that_is_a_file(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; give a folder"):
        fetch([f"{server.url}/a.svs"], tmp_path / "file")


def test_ctrl_c_keeps_what_came_and_the_same_command_goes_on(server, tmp_path):
    server.slow_s, folder = 1.5, tmp_path / "slides"
    server.files |= {f"/{k}.svs": CONTENT for k in range(4)}
    command = [sys.executable, "-m", "pathfm", "fetch", "--folder", str(folder), "--parallel", "2"]
    command += [f"{server.url}/{k}.svs#sha256={SHA}" for k in range(4)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=heeding_ctrl_c
    )
    while not (folder.is_dir() and partial_files(folder)):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130
    assert error.splitlines() == ["pathfm: interrupted; what is finished is kept, the same command goes on from here"]
    assert partial_files(folder)
    server.slow_s = 0
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert all((folder / f"{k}.svs").read_bytes() == CONTENT for k in range(4))
    assert any(server.ranges("/0.svs"))
