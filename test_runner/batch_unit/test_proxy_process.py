"""The proxy as a program: its options, how it refuses to start, its HTTP service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from fixtures.certificate import write_certificate
from fixtures.ports import PortDistributor
from fixtures.proxy import ZenithProxy

from proxy.main import is_loopback

PROGRAM = Path(sys.executable).parent / "proxy"
PASSWORD = ("--auth-method", "password")
STATIC = (*PASSWORD, "--static-router", "127.0.0.1:5432")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [str(PROGRAM), *options], capture_output=True, text=True, timeout=30, check=False
    )


def test_help_and_version() -> None:
    """--help shows every option and an example; -h is the address of the HTTP service."""
    text = run("--help").stdout
    for option in (
        *("-p HOST:PORT, --proxy HOST:PORT", "-h HOST:PORT, --http HOST:PORT"),
        *("--auth-method", "-s HOST:PORT, --static-router HOST:PORT", "-k FILE, --ssl-key FILE"),
        *("-c FILE, --ssl-cert FILE", "-m HOST:PORT, --mgmt HOST:PORT", "-u URL, --uri URL"),
        *("-a URL, --auth-endpoint URL", "sslmode=require", "RUST_LOG", "127.0.0.1:4432"),
    ):
        assert option in text
    assert run("--version").stdout.startswith("proxy ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--auth-method mixed needs a console, which is not supported"),
        (("--auth-method", "link"), "--auth-method link needs a console"),
        (PASSWORD, "give --auth-method password and --static-router HOST:PORT"),
        (("-s", "127.0.0.1:5432"), "--static-router requires --auth-method password"),
        ((*PASSWORD, "-s", "127.0.0.1:x"), "invalid address '127.0.0.1:x'"),
        ((*PASSWORD, "-s", "127.0.0.1:4432"), "is the proxy itself"),
        ((*STATIC, "-p", "nowhere"), "invalid address 'nowhere'"),
        ((*STATIC, "-p", "192.0.2.1:1"), "cannot listen on 192.0.2.1:1"),
        ((*STATIC, "-k", "/nowhere/key"), "belong together"),
        ((*STATIC, "-c", "/nowhere/cert"), "belong together"),
        ((*STATIC, "-k", "/nowhere/key", "-c", "/nowhere/cert"), "no file /nowhere/key"),
    ],
)
def test_start_that_is_refused(options: tuple[str, ...], said: str) -> None:
    """The reason is on stderr, and nothing else is."""
    done = run(*options)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_unknown_options() -> None:
    """Mistakes in the command line show how it is used."""
    for options in (("--auth-method", "none"), ("--nonsense",), ("--auth", "password")):
        done = run(*options)
        assert done.returncode == 2
        assert "usage: proxy" in done.stderr


def test_keys_that_do_not_fit(tmp_path: Path) -> None:
    """A certificate of another key, an encrypted key, and something else are refused."""
    other = tmp_path / "other"
    other.mkdir()
    _, certificate = write_certificate(tmp_path)
    other_key, _ = write_certificate(other)

    def said(key: Path) -> str:
        done = run(*STATIC, "-k", str(key), "-c", str(certificate))
        assert done.returncode == 1
        return done.stderr

    assert "cannot use the key" in said(other_key)
    assert "cannot use the key" in said(certificate)
    encrypted = tmp_path / "encrypted"
    encrypted.mkdir()
    assert "without a passphrase" in said(write_certificate(encrypted, "secret")[0])


@pytest.fixture
def proxy(test_output_dir: str, port_distributor: PortDistributor) -> Iterator[ZenithProxy]:
    """A proxy to a server that is not there."""
    get_port = port_distributor.get_port
    with ZenithProxy(get_port(), get_port(), Path(test_output_dir) / "proxy.log") as running:
        yield running


def test_http_service(proxy: ZenithProxy) -> None:
    """Status, metrics, nothing else; options of a console are taken, and said to have no effect."""
    proxy.start_static("127.0.0.1:1", ("--mgmt", "127.0.0.1:7000", "--uri", "http://x/"))
    url = f"http://127.0.0.1:{proxy.http_port}"
    response = requests.get(f"{url}/v1/status", timeout=10)
    assert (response.status_code, response.text) == (200, '""')
    metrics = requests.get(f"{url}/metrics", timeout=10)
    assert metrics.headers["Content-Type"].startswith("text/plain")
    names = ("num_connections_accepted", "num_connections_closed", "num_bytes_proxied")
    for name in names:
        assert f"# TYPE zenith_proxy_{name} counter\nzenith_proxy_{name} 0\n" in metrics.text
    assert requests.get(f"{url}/v1/nothing", timeout=10).status_code == 404
    text = proxy.log_text()
    assert "--mgmt has no effect with --static-router" in text
    assert "--uri has no effect with --static-router" in text
    assert "clear text" not in text


def test_two_proxies_on_one_port(proxy: ZenithProxy) -> None:
    """The second one says which port is taken."""
    proxy.start_static("127.0.0.1:1")
    taken = f"127.0.0.1:{proxy.port}"
    done = run(*STATIC, "--proxy", taken, "--http", "127.0.0.1:0")
    assert done.returncode == 1
    assert f"cannot listen on {taken}: Address already in use" in done.stderr


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("127.example.com", False)),
    ],
)
def test_who_is_warned_of_clear_text(host: str, only_here: bool) -> None:
    """Everybody whose clients may come over a network and who gives no certificate."""
    assert is_loopback(host) is only_here
