import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch

from rope_mm import SCHEMES, Rotary, place
from rope_mm.analysis.explorer import (
    EXAMPLES,
    MAX_TOKENS,
    View,
    describe,
    factor_extensions,
    read_view,
    serve,
)
from rope_mm.analysis.geometry import decay


@pytest.fixture
def address():
    server = serve(port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def get(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, answer.headers, answer.read().decode()


@pytest.mark.parametrize("name", ["rope-tv", "m-rope", "grid", "flux2", "flat", "circle"])
@pytest.mark.parametrize("segments", EXAMPLES.values())
def test_a_view_shows_the_positions_that_the_scheme_gives(name, segments):
    seen = describe(View(scheme=name, segments=segments))
    positions, _ = SCHEMES[name].place(segments)
    assert [token["position"] for token in seen["tokens"]] == positions.tolist()
    assert len(seen["scores"]) == len(positions)
    assert seen["scores"][0] == pytest.approx(1)
    assert json.loads(json.dumps(seen)) == seen


@pytest.mark.parametrize(
    "query",
    [
        "scheme=rope-tv",
        "scheme=rope-tv-causal&opt.rate=0.5&theta=500",
        "scheme=m-rope&extension=yarn&factor=4&original=512&head_dim=32",
        "scheme=videorope&opt.step=1.5&extension=linear&factor=2",
    ],
)
def test_the_python_lines_give_the_rotary_and_the_positions_that_are_shown(query):
    view = read_view(query)
    seen, names = describe(view), {}
    q = torch.randn(1, len(seen["tokens"]), 4, view.head_dim)
    names |= {"q": q, "k": q}
    exec(seen["python"], names)
    assert names["positions"].tolist() == [token["position"] for token in seen["tokens"]]
    length = float(names["positions"].max()) + 1
    omega = names["rope"].scheme.omega(view.head_dim, length=length)
    assert omega.T.tolist() == [pair["omega"] for pair in seen["pairs"]]
    assert names["q"].shape == q.shape


def test_scores_are_those_of_heads_of_ones_that_are_rotated():
    view = View(scheme="rope-tv", segments="text:3 image:2x3 text:2", token=4)
    rope = Rotary(view.head_dim, view.scheme)
    positions, _ = place(view.segments, "rope-tv")
    x = torch.zeros(1, len(positions), 1, view.head_dim, dtype=torch.float64)
    x[..., : view.head_dim // 2] = 1  # the first channel of every pair
    q, k = rope(x.float(), x.float(), positions)
    expected = (q[0, :, 0] @ k[0, 4, 0]) / (view.head_dim // 2)
    torch.testing.assert_close(torch.tensor(describe(view)["scores"]), expected, atol=1e-5, rtol=0)


def test_the_decay_begins_at_one_and_a_slow_pair_hardly_falls():
    fast, slow = decay(torch.tensor([1.0])), decay(torch.tensor([1e-4]))
    assert fast[0] == slow[0] == 1
    assert min(fast) < -0.9
    assert min(slow) > 0.99


def test_text_inside_a_long_video_overlaps_it_under_m_rope_hf_and_not_under_m_rope():
    segments = EXAMPLES["text inside a long video"]
    inside = describe(View(scheme="m-rope-hf", segments=segments))["overlaps"]
    assert len(inside) == 1
    assert "tokens of text:12 (segment 2) stand no later in time" in inside[0]
    assert describe(View(scheme="m-rope", segments=segments))["overlaps"] == []


def test_tokens_that_share_a_position_are_named_as_collisions():
    seen = describe(View(scheme="grid", segments="image:2x2 image:2x2"))
    assert seen["collisions"] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_pair_that_hardly_turns_is_called_dead_and_one_that_turns_too_fast_aliased():
    pairs = describe(View(scheme="rope-tv", segments="image:2x2", theta=1e9))["pairs"]
    assert (pairs[1]["state"], pairs[-1]["state"]) == ("useful", "dead")
    states = {pair["state"] for pair in describe(View(scheme="ltx", segments="video:4x4x4"))["pairs"]}
    assert "aliased" in states


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("scheme=rope-tvv", "did you mean 'rope-tv'"),
        ("segments=text:1000000000", f"1000000000 tokens; the page shows 1 to {MAX_TOKENS}"),
        ("segments=", "0 tokens"),
        ("segments=txt:3", "text"),
        ("segments=" + "text:1+" * 200, "more than 400 characters"),
        ("theta=nan", "theta must be a finite number, not 'nan'"),
        ("head_dim=2.5", "head_dim must be a finite whole number"),
        ("head_dim=100000", "head_dim must be 2 to 512"),
        ("token=99", "token must be 0 to 33"),
        ("opt.speed=1", "speed"),
        ("extension=magic", "extension 'magic' is unknown here"),
        ("colour=red", "'colour' is not part of a view"),
    ],
)
def test_a_view_that_cannot_be_shown_is_refused_in_a_sentence(query, message):
    with pytest.raises(ValueError, match=message):
        describe(read_view(query))


def test_every_extension_that_the_page_offers_gives_a_view():
    assert "yarn" in factor_extensions()
    for name in factor_extensions():
        assert describe(View(scheme="m-rope", extension=name, factor=2.0))["pairs"]


def test_the_server_answers_the_page_its_choices_a_view_and_a_sentence_for_bad_input(address):
    status, headers, page = get(address)
    assert status == 200
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    offered = json.loads(get(f"{address}/choices")[2])
    assert "rope-tv" in offered["schemes"]
    assert "rope-tv" not in offered["without_theta"] and "log" in offered["without_theta"]["pixel-log"]
    assert offered["read_theta"] == ["yarn"]
    assert json.loads(get(f"{address}/view?scheme=m-rope")[2])["axes"] == ["t", "y", "x"]
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        get(f"{address}/view?scheme=nope")
    assert "is unknown" in json.loads(refused.value.read())["error"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{address}/etc/passwd")


def test_a_request_under_a_foreign_host_name_is_refused(address):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(address, Host="example.org")


def test_a_port_in_use_is_named_in_a_sentence(address):
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=f"port {port} cannot be used"):
        serve(port)


def test_the_command_serves_the_page_until_it_is_interrupted():
    command = [sys.executable, "-m", "rope_mm.cli", "explore", "--port", "0", "--no-browser"]
    # a job in the background of a shell would leave it deaf to the interrupt
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert "rope-mm explorer" in get(address)[2]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
