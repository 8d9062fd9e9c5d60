"""The digests that the Hub and the bucket tell are used; those of other servers are not."""

import base64
import hashlib

import pytest
from downloads import (
    BUCKET,
    CONFIG,
    CONTENT,
    OTHER,
    WEIGHTS,
    Recorder,
    digest_of,
    fails,
    fetch,
    pinned,
    refused_url,
    remote,
    starts,
)
from servers import compressed, framed, garbage, headers, redirect, reset, status, truncate

from gpt_xp.hub.download import download

# --- the Hub --------------------------------------------------------------------------------------------------------


def test_weights_from_the_hub_are_resolved_at_each_try_and_resumed(hub, target):
    hub.cdn.faults[WEIGHTS] = [reset(20_011), truncate(30_011), status(403), status(500), reset(10_007)]
    fetch(remote(hub, WEIGHTS), target)
    assert starts(hub.cdn, WEIGHTS) == [None, 20_011, 50_022, 50_022, 50_022, 60_029]
    assert len(starts(hub, WEIGHTS)) == 6
    assert hub.cdn.sent(WEIGHTS) == len(CONTENT)
    etag = f'"{hub.cdn.etag(CONTENT)}"'
    assert [request.headers["If-Range"] for request in hub.cdn.requests] == [None] + [etag] * 5


def test_the_linked_digest_serves_and_the_etag_of_the_cdn_does_not(hub, target):
    assert download(remote(hub, WEIGHTS), target, Recorder()) == digest_of(CONTENT)
    target.unlink()
    hub.cdn.faults[WEIGHTS] = [garbage()]
    fails(remote(hub, WEIGHTS), target, "wrong bytes came")
    fetch(remote(hub, WEIGHTS), target)


def test_the_linked_digest_of_a_small_file(hub, target):
    content = hub.files[CONFIG]
    assert download(remote(hub, CONFIG), target, Recorder()) == digest_of(content, "git-sha1")
    target.unlink()
    fetch(pinned(hub, CONFIG, content), target, content)
    target.unlink()
    place = "/api/resolve-cache/models/openai-community/gpt2/607a30d7/config.json"
    hub.faults[place] = [garbage(), [reset(5), framed("chunked")]]
    fails(remote(hub, CONFIG), target, "wrong bytes came .*git-sha1")
    fetch(remote(hub, CONFIG), target, content)
    assert starts(hub, place) == [None, None, None, None, 5]


@pytest.mark.parametrize("etag", [None, '"abc"', '"' + "g" * 64 + '"', "0" * 39])
def test_another_kind_of_linked_etag_is_no_digest(hub, target, etag):
    hub.always[WEIGHTS] = headers({"X-Linked-ETag": etag})
    assert download(remote(hub, WEIGHTS), target, Recorder()) == digest_of(CONTENT)


def test_a_linked_etag_of_the_cdn_is_no_digest(hub, target):
    hub.always[WEIGHTS] = headers({"X-Linked-ETag": None})
    hub.cdn.always[WEIGHTS] = headers({"X-Linked-ETag": f'"{digest_of(OTHER)[7:]}"'})
    fetch(remote(hub, WEIGHTS), target)


def test_a_dead_cdn_is_an_error_without_the_signature(hub, target):
    hub.always[WEIGHTS] = redirect(f"{refused_url()}?X-Signature=5ecret")
    assert "5ecret" not in fails(pinned(hub, WEIGHTS), target, "the connection was refused")
    hub.always.clear()
    for fault in (status(404), status(403), status(500), reset(0), truncate(0), compressed(), garbage()):
        hub.cdn.always[WEIGHTS] = fault
        fails(pinned(hub, WEIGHTS), target, "weights")
    hub.cdn.always.clear()
    fetch(pinned(hub, WEIGHTS), target)


def test_the_md5_of_the_bucket_serves(bucket, target):
    assert download(remote(bucket, BUCKET), target, Recorder()) == digest_of(CONTENT, "md5")
    target.unlink()
    for faults in ([garbage()], [reset(40_009), garbage()]):
        bucket.faults[BUCKET] = faults
        fails(remote(bucket, BUCKET), target, "wrong bytes came .*md5")
        fetch(remote(bucket, BUCKET), target)
        target.unlink()


def test_the_md5_on_a_range_is_that_of_the_whole_file(bucket, target):
    of_range = base64.b64encode(hashlib.md5(CONTENT[40_009:]).digest()).decode()
    bucket.faults[BUCKET] = [[reset(40_009), headers({"Content-MD5": None})], headers({"Content-MD5": of_range})]
    assert download(remote(bucket, BUCKET), target, Recorder()) == digest_of(CONTENT, "md5")
    assert target.read_bytes() == CONTENT
    assert bucket.sent(BUCKET) == len(CONTENT)


@pytest.mark.parametrize("value", ["", "=", "AAAA", "é"])
def test_another_kind_of_md5_is_no_digest(bucket, target, value):
    bucket.always[BUCKET] = headers({"Content-MD5": value})
    assert download(remote(bucket, BUCKET), target, Recorder()) == digest_of(CONTENT)
