"""Answers of servers: which are final, which are tried again, and when."""

import time
from dataclasses import replace
from email.utils import formatdate

import pytest
from downloads import CONTENT, PATH, TOKEN, fails, fetch, pinned, remote, starts
from servers import compressed, framed, headers, no_ranges, redirect, reset, status, truncate

# --- what servers answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418, 451, 501, 304, 302, 204, 299, 599])
def test_some_answers_are_final(server, target, code):
    server.faults[PATH] = [status(code, body=b"" if code in (204, 304) else b"\x1b[31mno")]
    fails(pinned(server), target, f"127.0.0.1: the server answered {code}")
    assert len(server.requests) == 1
    fetch(pinned(server), target)


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_some_answers_are_worth_another_try(server, target, code, waits):
    server.faults[PATH] = [status(code), [reset(11), framed("length")], status(code)]
    progress = fetch(pinned(server), target)
    assert starts(server) == [None, None, 11, 11]
    assert str(code) in progress.notes[0]
    assert waits == [0.5, 0.5, 1]


def test_retry_after_is_obeyed(server, target, waits):
    date = formatdate(time.time() + 10, usegmt=True)
    values = ["7", "0", date, formatdate(0, usegmt=True), "soon"]
    server.always[PATH] = lambda server, request, answer: answer
    for value in values:
        server.faults[PATH] = [status(429, {"Retry-After": value})]
        fetch(pinned(server), target)
    assert waits[:2] == [7, 0]
    assert 5 < waits[2] < 10.5
    assert waits[3:] == [0, 0.5]


@pytest.mark.parametrize("code", [429, 503])
def test_a_long_retry_after_is_an_error_that_says_so(server, target, waits, code):
    server.faults[PATH] = [reset(11), status(code, {"Retry-After": "3607"})]
    fails(pinned(server), target, f"{code} .* wait 3607 s: try again then; 11 bytes are kept")
    assert waits == [0.5]
    fetch(pinned(server), target)
    assert server.sent(PATH) == len(CONTENT)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed_at_each_try(server, target, code):
    server.always["/a"] = redirect("b?x=1", code)
    server.always["/b"] = redirect(f"{server.url}{PATH}", code)
    server.faults[PATH] = [reset(40_009)]
    fetch(replace(pinned(server), url=f"{server.url}/a"), target)
    assert [request.path for request in server.requests] == ["/a", "/b", PATH] * 2
    assert server.sent(PATH) == len(CONTENT)


def test_a_loop_of_redirects_ends(server, target):
    server.faults[PATH] = [redirect(PATH)] * 8
    fails(pinned(server), target, "more than 8 redirects")
    server.faults.clear()
    fetch(pinned(server), target)


@pytest.mark.parametrize(
    "to",
    ["ftp://127.0.0.1/x", "file:///etc/passwd", "//[", "http://a:99999/x", "http://127.0.0.1:99999/x", "http://.."],
)
def test_a_redirect_that_leads_nowhere(server, target, to):
    server.faults[PATH] = [redirect(to)] * 4
    fails(replace(pinned(server), token=TOKEN), target, "redirects|malformed|no address|another host")
    server.faults.clear()
    fetch(pinned(server), target)


def test_a_server_without_ranges(server, target):
    server.always[PATH] = no_ranges()
    server.faults[PATH] = [reset(40_009)]
    progress = fetch(pinned(server), target)
    assert starts(server) == [None, 40_009]
    assert progress.starts[-1] == ("weights", len(CONTENT), 0)


@pytest.mark.parametrize(
    "place", [None, "", "bytes */100003", "bytes 40008-100002/100003", "bytes 0-100002/100003", "items 40009-5/9",
              "bytes 40009-100002/" + "9" * 5000]
)  # fmt: skip
def test_a_part_that_was_not_asked_for_is_not_used(server, target, place):
    server.faults[PATH] = [reset(40_009), headers({"Content-Range": place})]
    fetch(pinned(server), target)
    assert starts(server) == [None, 40_009, None]


def test_a_length_that_is_no_number_is_none(server, target):
    server.faults[PATH] = [[framed("close"), headers({"Content-Length": "9" * 5000})]]
    fetch(remote(server), target)


def test_ranges_in_slices(server, target):
    def slices(server, request, answer):
        end = (request.start or 0) + 30_011 - 1
        if request.start is None or end >= len(CONTENT):
            return answer
        changed = {**answer.headers, "Content-Range": f"bytes {request.start}-{end}/{len(CONTENT)}"}
        return replace(answer, headers=changed, body=answer.body[:30_011])

    server.always[PATH] = slices
    server.faults[PATH] = [truncate(7)]
    fetch(pinned(server), target)
    assert starts(server) == [None, 7, 30_018, 60_029, 90_040]


def test_a_compressed_answer_is_refused(server, target):
    server.faults[PATH] = [compressed()]
    fails(pinned(server), target, "compresses the file though it was asked not to")
    fetch(pinned(server), target)
