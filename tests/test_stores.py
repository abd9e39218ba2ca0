"""Real servers: nginx and an S3 API; Google's and Azure's addresses; credentials, and what is missing."""

from __future__ import annotations

import os

import boto3
import numpy as np
import pytest
from servers import Faulty, needed, nginx, s3_server
from slide_files import cohort_of

from pathfm import Cohort, InputError, stores
from pathfm.source import open_all, open_source, read_all
from pathfm.stores import Patience, Place

SIZE = 1_000_000
HASTY = Patience(tries=3, first_s=0.001, timeout_s=10.0)
NAMES = ("a.svs", "folder/b c.svs", "ü%20+&#.svs")
KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "secret", "region_name": "us-east-1"}


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture(scope="module")
def web(data, tmp_path_factory):
    """nginx over a folder with slides of these NAMES and an empty one: its address and the folder."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "folder").mkdir()
    for name in NAMES:
        (folder / name).write_bytes(data)
    (folder / "empty.svs").touch()
    with nginx(folder, tmp_path_factory.mktemp("nginx")) as address:
        yield address, folder


@pytest.fixture(scope="module")
def s3(data):
    """An S3 API with a bucket `slides`, and a client of boto3 to it."""
    with s3_server() as address:
        client = boto3.client("s3", endpoint_url=address, **KEYS)
        client.create_bucket(Bucket="slides")
        for name in NAMES:
            client.put_object(Bucket="slides", Key=name, Body=data)
        client.put_object(Bucket="slides", Key="public.svs", Body=data, ACL="public-read")
        client.put_object(Bucket="slides", Key="empty.svs", Body=b"")
        yield address, client


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """As on a machine where nobody has logged in anywhere."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    stores._store.cache_clear()
    yield
    stores._store.cache_clear()


@pytest.fixture
def keys(monkeypatch, s3):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3[0])


def some_ranges() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, SIZE - 20_000, 60), rng.integers(1, 20_000, 60)


def cut(data: bytes, starts, lengths) -> list[bytes]:
    return [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]


# --- a web server


def test_ranges_of_many_slides_from_a_web_server(web, data):
    quoted = ("a.svs", "folder/b%20c.svs", "%C3%BC%2520+&%23.svs")
    opened = open_all([f"{web[0]}/{name}" for name in quoted])
    stat = os.stat(web[1] / "a.svs")
    assert {each.size for each in opened} == {SIZE}
    assert opened[0].tag == f'"{int(stat.st_mtime):x}-{SIZE:x}"'  # as nginx makes its ETag
    starts, lengths = some_ranges()
    requests = [(each, starts[k::3], lengths[k::3]) for k, each in enumerate(opened)]
    assert read_all(requests) == [cut(data, starts[k::3], lengths[k::3]) for k in range(3)]
    with opened[1].file() as file:
        file.seek(-10, 2)
        assert file.read() == data[-10:]


def test_files_that_a_web_server_does_not_give(web):
    wrong = {
        "none.svs": "none.svs does not exist; correct its path",
        "forbidden/a.svs": "is forbidden .*403",
        "whole/a.svs": "does not serve byte ranges",
        "empty.svs": r"is empty \(0 bytes\)",
        "folder//b.svs": "folder//b.svs cannot be read .*empty path segment",
    }
    found = open_all([f"{web[0]}/{name}" for name in wrong], patience=HASTY)
    for error, complaint in zip(found, wrong.values(), strict=True):
        assert isinstance(error, InputError)
        with pytest.raises(InputError, match=complaint):
            raise error


@pytest.mark.parametrize("way", ["", "untagged/"])
def test_a_file_that_changes_on_a_web_server_is_named(web, data, way):
    """By its ETag, and by time and size where the server gives none."""
    slide = web[1] / "changing.svs"
    slide.write_bytes(data)
    opened = open_source(f"{web[0]}/{way}changing.svs", patience=HASTY)
    assert opened.tag.startswith('"') == (way == "")
    assert opened.read([5], [10]) == [data[5:15]]
    slide.write_bytes(data[::-1])
    os.utime(slide, (1e9, 1e9))
    with pytest.raises(InputError, match=r"changing.svs has changed .*index it again"):
        opened.read([5], [10])
    known = open_source(opened.path, SIZE, opened.tag, HASTY)
    with pytest.raises(InputError, match="has changed"):
        known.read([5], [10])
    again = open_source(opened.path)
    assert again.identity != opened.identity
    assert again.read([5], [10]) == [data[::-1][5:15]]


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(stores.Patience, "wait_s", lambda *_: 0)
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/a.svs cannot be read: .*refuses.*, 3 times in a row"):
        open_source("http://127.0.0.1:1/a.svs", patience=HASTY)


def test_a_signature_in_an_address_is_used_and_never_shown(data):
    with Faulty({"/a.svs": data}) as server:
        secret = f"http://user:word@{server.address[7:]}/a.svs?X-Signature=abc%2F1"
        opened = open_source(secret, patience=HASTY)
        assert opened.read([1], [2]) == [data[1:3]]
        assert {path for path, *_ in server.log} == {"/a.svs?X-Signature=abc%2F1"}
        server.faults.extend(["403"] + ["503"] * 3 + ["etag"] * 3)
        texts = [repr(opened), opened.identity]
        for _ in range(3):
            with pytest.raises(InputError) as error:
                opened.read([1], [2])
            texts.append(str(error.value))
        with pytest.raises(InputError, match="bytes") as error:
            opened.read([SIZE], [1])
    assert all("a.svs" in text and "abc" not in text and "word" not in text for text in [*texts, str(error.value)])


# --- an S3 API


def test_ranges_of_many_slides_from_a_bucket(keys, s3, data):
    opened = open_all([f"s3://slides/{name}" for name in NAMES] * 20)[:3]
    assert stores._store.cache_info().misses == 1  # one store, and one search for credentials, whatever the slides
    assert opened[0].tag == s3[1].head_object(Bucket="slides", Key="a.svs")["ETag"]
    starts, lengths = some_ranges()
    requests = [(each, starts[k::3], lengths[k::3]) for k, each in enumerate(opened)]
    assert read_all(requests) == [cut(data, starts[k::3], lengths[k::3]) for k in range(3)]


def test_an_object_that_changes_is_named(keys, s3, data):
    s3[1].put_object(Bucket="slides", Key="changing.svs", Body=data)
    opened = open_source("s3://slides/changing.svs", patience=HASTY)
    s3[1].put_object(Bucket="slides", Key="changing.svs", Body=data[::-1])
    with pytest.raises(InputError, match=r"s3://slides/changing.svs has changed .*index it again"):
        opened.read([5], [10])
    assert open_source(opened.path).read([5], [10]) == [data[::-1][5:15]]


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("s3://slides/none.svs", "s3://slides/none.svs does not exist; correct"),
        ("s3://nowhere/a.svs", "does not exist: there is no bucket 'nowhere'"),
        ("s3://slides/empty.svs", "is empty"),
    ],
)
def test_objects_that_are_not_there(keys, address, complaint):
    with pytest.raises(InputError, match=complaint):
        open_source(address, patience=HASTY)


def test_a_bucket_without_credentials(s3, data, monkeypatch):
    """No credentials: said at once. Anonymous: what is public is read, what is not is forbidden."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3[0])
    with pytest.raises(InputError, match=r"s3://slides/public.svs .*no credentials are found; set AWS_ACCESS_KEY_ID"):
        open_source("s3://slides/public.svs")
    assert open_source("s3://slides/public.svs", skip_signature=True).read([1], [2]) == [data[1:3]]
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert open_source("s3://slides/public.svs").read([1], [2]) == [data[1:3]]
    with pytest.raises(InputError, match=r"s3://slides/a.svs is forbidden .*set AWS_ACCESS_KEY_ID"):
        open_source("s3://slides/a.svs")


def test_a_profile_gives_credentials_region_and_endpoint(data, tmp_path, monkeypatch):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[lab]\naws_access_key_id = LAB\naws_secret_access_key = secret\n")
    with Faulty({"/slides/a.svs": data}) as server:
        profile = f"[profile lab]\nregion = eu-north-1\nendpoint_url = {server.address}\n"
        (tmp_path / ".aws" / "config").write_text(profile)
        monkeypatch.setenv("AWS_PROFILE", "lab")
        assert open_source("s3://slides/a.svs").read([1], [2]) == [data[1:3]]
        assert all("Credential=LAB/" in each and "/eu-north-1/s3/" in each for each in server.authorisations)
    monkeypatch.setenv("AWS_PROFILE", "lap")
    stores._store.cache_clear()
    with pytest.raises(InputError, match=r"s3://slides/a.svs .*lap.* could not be found; set AWS"):
        open_source("s3://slides/a.svs")


# --- Google's and Azure's


def test_google_storage(data, tmp_path, monkeypatch):
    with Faulty({"/slides/sub/a.svs": data}) as server:
        anonymous = {"base_url": server.address, "skip_signature": True}
        assert open_source("gs://slides/sub/a.svs", **anonymous).read([1], [2]) == [data[1:3]]
        with pytest.raises(InputError, match="gs://slides/b.svs does not exist"):
            open_source("gs://slides/b.svs", **anonymous)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"gs://slides/a.svs .*none.json.*GOOGLE_APPLICATION_CREDENTIALS or run"):
        open_source("gs://slides/a.svs")


def test_azure_storage(data, monkeypatch):
    with pytest.raises(InputError, match=r"az://slides/a.svs .*Account must be specified; set AZURE_STORAGE_CONN"):
        open_source("az://slides/a.svs")
    with Faulty({"/slides/a.svs": data}) as server:
        text = f"DefaultEndpointsProtocol=http;AccountName=lab;AccountKey=a2V5PT0=;BlobEndpoint={server.address}"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        assert open_source("az://slides/a.svs").read([1], [2]) == [data[1:3]]
        assert all(each.startswith("SharedKey lab:") for each in server.authorisations)
        monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
        monkeypatch.setenv("AZURE_IDENTITY_ENDPOINT", f"{server.address}/identity")  # the machine has none
        with pytest.raises(InputError, match=r"az://slides/a.svs needs credentials.*set AZURE_STORAGE_CONN"):
            open_source("az://slides/a.svs", patience=HASTY, account_name="lab", endpoint=server.address)


# --- addresses


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("s4://slides/a.svs", "'s4://slides/a.svs' has the unknown scheme 's4'. Did you mean 's3'"),
        ("gcs://slides/a.svs", "unknown scheme 'gcs'. Did you mean 'gs'"),
        ("file:///a.svs", "unknown scheme 'file'.*Known: az, gs, http, https, s3"),
        ("s3:/slides/a.svs", "lacks a slash after 's3:'; give addresses as text, not as a Path"),
        ("s3://slides", "names no file; give s3://slides/path/to/slide.svs"),
        ("https://host/", "names no file"),
        ("https:///a.svs", "names no file; give https://where/path"),
        ("http://a b/c.svs", "http://a b/c.svs cannot be read: invalid international domain name"),
    ],
)
def test_addresses_that_cannot_be(address, complaint):
    with pytest.raises(InputError, match=complaint):
        open_source(address, patience=HASTY)


def test_an_option_that_the_store_does_not_know_is_named():
    with pytest.raises(
        InputError, match="s3://slides/a.svs cannot be read: Configuration key: 'endpiont' is not valid"
    ):
        open_source("s3://slides/a.svs", skip_signature=True, endpiont="http://localhost")


def test_an_address_in_parts():
    assert Place.of("s3://bucket/a folder/b%20?c#d.svs")[:3] == ("s3", "bucket", "a folder/b%20?c#d.svs")
    assert Place.of("https://host:8/a%20b.svs?x=%2F#f") == (
        "https",
        "https://host:8/?x=%2F",
        "a b.svs",
        "https://host:8/a%20b.svs",
    )


def test_a_cohort_holds_addresses_as_they_are(tmp_path):
    paths = {"a": "s3://bucket/a b.svs", "b": "https://host/b.svs?x=1", "c": str(tmp_path / "slides" / "c.svs")}
    cohort_of(paths).write(tmp_path / "cohort.csv")
    assert "c,slides/c.svs" in (tmp_path / "cohort.csv").read_text()
    assert dict(Cohort.read(tmp_path / "cohort.csv").table[["slide_id", "path"]].to_numpy()) == paths


def test_a_missing_program_skips_its_tests_and_fails_them_where_all_must_run(monkeypatch):
    assert os.access(needed("sh"), os.X_OK)
    for ci, outcome in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match="no-such-server is not installed"):
            needed("no-such-server")
