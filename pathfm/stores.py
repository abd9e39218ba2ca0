"""Object stores and web servers, through obstore: addresses, credentials, patience, and what an error means.

s3://bucket/key     Credentials as boto3 finds them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_PROFILE with
                    its keys, role or SSO login; the machine's role. AWS_REGION or the profile's. AWS_ENDPOINT_URL
                    for other S3 servers (MinIO, Ceph, R2). AWS_SKIP_SIGNATURE=true: a public bucket, without any.
gs://bucket/key     GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine's
                    account. GOOGLE_SKIP_SIGNATURE=true: a public bucket.
az://container/key  AZURE_STORAGE_CONNECTION_STRING; or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY,
                    AZURE_STORAGE_SAS_TOKEN, AZURE_CLIENT_ID and its kin, AZURE_USE_AZURE_CLI=true, or the machine's
                    identity. AZURE_SKIP_SIGNATURE=true: a public container.
https://host/path   None, or a signature in the address itself, which no message repeats. http:// too.

Options given to `pathfm.source.open_source` go before the environment; they are those of obstore's S3Config,
GCSConfig and AzureConfig: endpoint, region, skip_signature, request_payer, ...
"""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
from concurrent.futures import CancelledError
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pathfm.errors import InputError, nearest

SCHEMES = ("s3", "gs", "az", "https", "http")
CHANGED_TRIES = 3  # another version is asked for this often: a cache on the way may be behind

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_SKIP_SIGNATURE=true for a public "
    "bucket, AWS_ENDPOINT_URL for another S3 server",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or run `gcloud auth application-default login`; "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; "
    "AZURE_SKIP_SIGNATURE=true for a public container",
    "https": "the server wants a login, or a signature in the address that has not expired",
}


class Patience(NamedTuple):
    """How a store is asked again: after first_s, twice that, ... up to longest_s, each cut by up to half at random."""

    tries: int = 8  # answers asked for in all; with these numbers 6 to 13 s of waiting
    first_s: float = 0.1
    longest_s: float = 15.0
    timeout_s: float = 30.0  # for the server's first bytes, and then for any next ones

    def wait_s(self, again: int) -> float:
        """Seconds before the `again`-th repetition, from 1."""
        return random.uniform(0.5, 1.0) * min(self.first_s * 2 ** (again - 1), self.longest_s)


PATIENCE = Patience()


class Place(NamedTuple):
    """Where an object lies."""

    kind: str  # "s3", "gs", "az" or "https"
    base: str  # the bucket, or the server's address
    key: str
    shown: str  # the address without what is secret in it

    @classmethod
    def of(cls, path: str) -> Place:
        """Raises InputError for an address that cannot be one."""
        scheme, _, rest = path.partition("://")
        if not rest:
            raise InputError(
                f"'{path}' lacks a slash after '{path.split('/')[0]}'; give addresses as text, not as a Path"
            )
        if scheme not in SCHEMES:
            raise InputError(f"'{path}' has the unknown scheme '{scheme}'.{nearest(scheme, SCHEMES)}")
        if scheme in ("http", "https"):
            parts = urlsplit(path)
            host = parts.netloc.rpartition("@")[2]
            base = f"{scheme}://{parts.netloc}/" + (f"?{parts.query}" if parts.query else "")
            place = cls("https", base, unquote(parts.path.lstrip("/")), f"{scheme}://{host}{parts.path}")
        else:
            host, _, key = rest.partition("/")
            place = cls(scheme, host, key, path)
        if not host or not place.key:
            raise InputError(f"'{place.shown}' names no file; give {scheme}://{host or 'where'}/path/to/slide.svs")
        return place


class Answer(NamedTuple):
    """Bytes of an object, and what the store says of all of it."""

    data: bytes  # or another buffer
    size: int
    tag: str


def is_address(path: str) -> bool:
    """Whether `path` is meant for a store or server, well written or not."""
    return "://" in path or path.partition(":/")[0] in SCHEMES


def shown(path: str) -> str:
    """The path or address as messages give it: without a signature or password."""
    return Place.of(path).shown if is_address(path) else path


def changed(name: str) -> str:
    """The message about a file that is not the one that was opened or indexed."""
    return f"{name} has changed since it was opened or indexed; index it again (SlideIndex.build finds what changed)"


def retries() -> int:
    """How many answers of this process were no good and were asked for again."""
    return _retried


def get(
    place: Place,
    start: int,
    stop: int,
    known: tuple[int, str] | None,
    patience: Patience,
    options: dict,
    let_go: threading.Event | None = None,
) -> Answer:
    """Bytes start to stop of an object, checked: their number, and that the object is the one known.

    known   (size, tag); None where the object is new
    let_go  set when nobody waits for the answer any more: then it is not asked for again, and CancelledError raised

    Whatever may pass (5xx, 429, time-outs, broken connections, short bodies) is asked for again after a while;
    then, and at once for what will not pass, InputError names the address and what to do.
    """
    same_process()
    let_go = let_go or threading.Event()
    try:
        with _making:  # one thread looks for credentials; the others take what it makes
            store = _store(place.kind, place.base, patience.timeout_s, tuple(sorted(options.items())))
    except Exception as error:  # of boto3 or obstore, about credentials, options or a malformed address
        raise InputError(f"{place.shown} cannot be read: {_brief(str(error))}; {CREDENTIALS[place.kind]}") from error
    for again in itertools.count(1):
        try:
            return _ask(store, place, start, stop, known)
        except Exception as error:
            fault = _fault(error, place, patience)
            if again >= fault.tries:
                raise InputError(fault.message) from error
        _note_retry()
        if let_go.wait(patience.wait_s(again)):
            raise CancelledError


_retried, _lock, _making = 0, threading.Lock(), threading.Lock()


def _note_retry() -> None:
    global _retried
    with _lock:
        _retried += 1


_process: int | None = None  # the one that has used the network


def same_process() -> None:
    """Raises InputError in a process forked from one that has used the network.

    obstore's threads do not survive a fork, and a forked process would wait for them for ever.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise InputError(
            "no address can be read here: this process was forked from one that had used the network. "
            "Start workers afresh, with DataLoader(..., multiprocessing_context='forkserver')"
        )


class _BadAnswerError(Exception):
    """An answer that looks like one and is wrong."""


class _ChangedError(Exception):
    """An answer about another version of the object."""


def _ask(store, place: Place, start: int, stop: int, known: tuple[int, str] | None) -> Answer:
    import obstore

    wanted = {"range": (start, stop)}
    if known and known[1].startswith('"'):  # a weak tag, or a date, never matches
        wanted["if_match"] = known[1]
    result = obstore.get(store, place.key, options=wanted)
    size, tag = result.meta["size"], _tag(result.meta)
    if known and (size, tag.removeprefix("W/")) != (known[0], known[1].removeprefix("W/")):
        raise _ChangedError
    data = result.bytes()
    if len(data) != stop - start:
        raise _BadAnswerError(f"{len(data)} bytes came instead of {stop - start}")
    return Answer(data, size, tag)


def _tag(meta) -> str:
    """The ETag; without one, time and size (1970 where the server does not tell the time)."""
    return meta["e_tag"] or f"{meta['last_modified'].isoformat()} {meta['size']}"


class _Fault(NamedTuple):
    message: str
    tries: int  # how often in all it is asked for


def _fault(error: Exception, place: Place, patience: Patience) -> _Fault:
    """What an error of obstore means to a user, and whether it may pass."""
    from obstore import exceptions

    name, text, credentials = place.shown, str(error), CREDENTIALS[place.kind]
    status = re.search(r"status code: (\d{3})", text)
    status = int(status[1]) if status else None
    if isinstance(error, _ChangedError | exceptions.PreconditionError):
        return _Fault(changed(name), min(CHANGED_TRIES, patience.tries))
    if isinstance(error, FileNotFoundError):
        bucket = f": there is no bucket '{place.base}'" if "NoSuchBucket" in text else ""
        return _Fault(f"{name} does not exist{bucket}; correct its path", 1)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return _Fault(f"{name} is forbidden ({_brief(text)}); {credentials}", 1)
    if "token request" in text:
        return _Fault(f"{name} needs credentials, and none are found ({_brief(text)}); {credentials}", 1)
    if isinstance(error, exceptions.NotSupportedError):
        what = "is empty (0 bytes), or lies on a server that does not serve byte ranges"
        return _Fault(f"{name} {what}; put it in an object store or behind nginx or Apache, or download it", 1)
    if status == 416:
        return _Fault(f"{name} is empty (0 bytes), or ends before the bytes asked for; fetch the file again", 1)
    if "redirect without LOCATION" in text:
        return _Fault(f"{name} lies in another region; set AWS_REGION to the bucket's", 1)
    lasting = status is not None and status < 500 and status not in (408, 429)
    if lasting or not isinstance(error, _BadAnswerError | exceptions.BaseError):
        return _Fault(f"{name} cannot be read ({_brief(text)}); correct the address or the server's settings", 1)
    often = f"{patience.tries} times in a row"
    return _Fault(
        f"{name} cannot be read: {_passing(text, patience)}, {often}; try again later, or look after the server",
        patience.tries,
    )


def _passing(text: str, patience: Patience) -> str:
    """A failure that may pass, in a few words."""
    for sign, words in {
        "TimedOut": f"no answer within {patience.timeout_s:g} s",
        "Timeout": f"no answer within {patience.timeout_s:g} s",
        "dns error": "the name of the server is unknown",
        "ConnectionRefused": "the server refuses connections",
        "ConnectionReset": "the connection broke",
        "kind: Body": "the connection broke before the end",
    }.items():
        if sign in text:
            return words
    return _brief(text)


def _brief(text: str) -> str:
    """What matters of obstore's text: no address (it may hold a signature), no debugging, no XML."""
    message = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    line = text.partition("<")[0] + message[1] if message else text.split("\n")[0]
    line = re.sub(
        r"^The operation lacked [\w ]+ for path .*?: |Error performing \w+ \S+ in \S+ - |Generic \w+ error: |https?://\S+",
        "",
        line,
    )
    return re.sub(r"<[^>]*>|\s+", " ", line).replace("Server returned non-2xx status code: ", "").strip(" :")[:200]


@lru_cache(maxsize=64)
def _store(kind: str, base: str, timeout_s: float, options: tuple):
    """The store, with its pool of connections; shared by all of its slides. obstore's own retries are off."""
    from obstore import store

    wait, whole = (f"{round(seconds * 1000)}ms" for seconds in (timeout_s, 20 * timeout_s))
    client = {"allow_http": True, "connect_timeout": wait, "read_timeout": wait, "timeout": whole}
    own = {"client_options": client, "retry_config": {"max_retries": 0}}
    if kind == "s3":
        return store.S3Store(base, **own, **{**_aws(dict(options)), **dict(options)})
    if kind == "gs":
        return store.GCSStore(base, **own, **dict(options))
    if kind == "az":
        return store.AzureStore(base, **own, **{**_azure(), **dict(options)})
    return store.HTTPStore(base, **own, **dict(options))


def _aws(options: dict) -> dict:
    """Credentials as boto3 finds them, and region and endpoint where only a profile has them."""
    anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    if anonymous or {"skip_signature", "access_key_id"} & set(options):
        return {}
    import botocore.session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = botocore.session.get_session()
    if session.get_credentials() is None:
        raise LookupError("no credentials are found")
    found = {"credential_provider": Boto3CredentialProvider(session)}
    region, endpoint = session.get_config_variable("region"), session.get_scoped_config().get("endpoint_url")
    if region and "AWS_REGION" not in os.environ:
        found["region"] = region
    if endpoint and not {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & set(os.environ):
        found["endpoint"] = endpoint
    return found


def _azure() -> dict:
    """What a connection string says, which obstore does not read itself."""
    parts = (part.partition("=") for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"))
    names = {
        "AccountName": "account_name",
        "AccountKey": "account_key",
        "SharedAccessSignature": "sas_key",
        "BlobEndpoint": "endpoint",
    }
    return {names[name]: value for name, _, value in parts if name in names}
