"""Published reference moments, fetched from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from cluster.errors import CheckpointError
from learner.config import load_preset
from learner.rollouts.feature_space import stored_reference
from rewards.reference import fetch, main, read_reference
from rewards.reference.fetch import PUBLISHED, PublishedReference, reference_file

FILE = "VIRTUAL_imagenet256_labeled.npz"
FAILED, REFUSED = 1, 2
DIM = 32  # in the place of 2048, which would take seconds


def moments(dim: int = DIM, spoilt: float = 0.0) -> bytes:
    """A small file of the published form: images beside the moments."""
    sigma = np.zeros((dim, dim))
    np.fill_diagonal(sigma, 1.0)
    sigma[0, 1] = spoilt
    file = io.BytesIO()
    arrays = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.zeros(dim), "sigma": sigma}
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


WHOLE = moments()


class Server(ThreadingHTTPServer):
    """Serves one file; what it does wrong is set by the test."""

    content, status, ranges, breaks_at = WHOLE, 0, True, 0
    asked: list[str | None]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = []
        """The range of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/256/{FILE}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.server.status:
            self.send_error(self.server.status)
            return
        content, first = self.server.content, 0
        if wanted and self.server.ranges:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : self.server.breaks_at or None])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """It stands for the publisher's, and states the file's sum."""
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fetch, "FEATURES", DIM)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # bytes that a break may lose
    with Server() as server:
        publish(server, monkeypatch)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def publish(
    server: Server, monkeypatch: pytest.MonkeyPatch, content: bytes = WHOLE, *, stated: bool = True
) -> None:
    """Have the server's file be the one of imagenet256."""
    known = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} if stated else {}
    reference = PublishedReference(name="imagenet256", url=server.url, **known)  # type: ignore[arg-type]
    monkeypatch.setitem(PUBLISHED, "imagenet256", reference)
    server.content = content


def place() -> Path:
    return PUBLISHED["imagenet256"].place()


def left_over() -> list[str]:
    return sorted(f.name for f in place().parent.iterdir() if not f.name.endswith(".lock"))


def test_it_is_fetched_checked_and_found_by_its_name(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "imagenet256"]) == 0
    assert place().read_bytes() == WHOLE
    assert left_over() == [FILE, f"{FILE}.sha256"]
    assert stored_reference("imagenet256")
    assert read_reference(reference_file("imagenet256")).mu.shape == (DIM,)
    assert main(["fetch", "imagenet256"]) == 0
    assert len(server.asked) == 1
    assert "already, SHA-256 as stored" in capsys.readouterr().out


def test_into_another_directory(server: Server, tmp_path: Path) -> None:
    assert main(["fetch", "imagenet256", "--directory", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / FILE).is_file()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("stated", [True, False])
def test_a_broken_transfer_resumes(
    ranges: bool,
    stated: bool,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(server, monkeypatch, stated=stated)
    server.breaks_at = 300
    assert main(["fetch", "imagenet256"]) == REFUSED
    told = capsys.readouterr().err
    assert "run the same command again" in told
    assert str(place()) in told
    assert not place().exists()
    server.breaks_at, server.ranges = 0, ranges
    assert main(["fetch", "imagenet256"]) == 0
    assert place().read_bytes() == WHOLE
    assert server.asked[-1] == "bytes=300-"
    assert left_over() == [FILE, f"{FILE}.sha256"]


@pytest.mark.parametrize("content", [WHOLE[:-1] + b"?", WHOLE[:-10], WHOLE + b"more", b"<html>"])
def test_another_file_than_the_published_one_is_not_kept(
    content: bytes, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = content
    assert main(["fetch", "imagenet256"]) in (FAILED, REFUSED)
    assert not place().exists()
    assert "Traceback" not in capsys.readouterr().err
    server.content = WHOLE
    assert main(["fetch", "imagenet256"]) in (0, FAILED)
    assert main(["fetch", "imagenet256"]) == 0  # at the latest: what was wrong is gone
    assert place().read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (moments(64), "expected (32,), of FID's Inception, found (64,)"),
        (moments(spoilt=0.5), "expected a symmetric matrix"),
        (moments(spoilt=float("nan")), "expected finite numbers"),
        (b"<html>not found</html>", "not an .npz file"),
    ],
)
def test_where_no_sum_is_known_the_moments_are_looked_at(
    content: bytes,
    message: str,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(server, monkeypatch, content, stated=False)
    assert main(["fetch", "imagenet256"]) == FAILED
    assert message in capsys.readouterr().err
    assert left_over() == []


def test_where_no_sum_is_known_the_first_one_is_noted(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(server, monkeypatch, stated=False)
    assert main(["fetch", "imagenet256"]) == 0
    digest = hashlib.sha256(WHOLE).hexdigest()
    assert f"its SHA-256 is not published, stored is {digest}" in capsys.readouterr().out
    place().write_bytes(moments(spoilt=1e-9))
    assert main(["fetch", "imagenet256"]) == FAILED
    assert f".sha256 says {digest}" in capsys.readouterr().err


def test_a_file_placed_by_hand_is_verified(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    place().parent.mkdir()
    place().write_bytes(moments(64))
    assert main(["fetch", "imagenet256"]) == FAILED
    assert "move the file away to fetch it again" in capsys.readouterr().err
    place().write_bytes(WHOLE)
    assert main(["fetch", "imagenet256"]) == 0
    assert server.asked == []


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_server_that_refuses(
    status: int, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = status
    assert main(["fetch", "imagenet256"]) == FAILED
    told = capsys.readouterr().err
    assert f"HTTP {status}" in told
    assert f"place {server.url} at {place()}" in told


def test_no_network(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.shutdown()
    server.server_close()
    assert main(["fetch", "imagenet256"]) == REFUSED
    told = capsys.readouterr().err
    assert "was not reached, or the transfer broke off" in told
    assert f"place {server.url} at {place()}" in told


def test_a_directory_that_cannot_be_written(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").write_text("a file")
    assert main(["fetch", "imagenet256"]) == FAILED
    assert "cannot keep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meant"),
    [("imagenet", "imagenet256"), ("imagnet64", "imagenet64"), (FILE, "imagenet256")],
)
def test_the_nearest_name(name: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", name]) == REFUSED
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


def test_what_is_published() -> None:
    known = PUBLISHED["imagenet256"]
    assert (known.file, known.size, len(known.sha256)) == (FILE, 2_037_122_530, 64)
    for name, reference in PUBLISHED.items():
        pixels = name.removeprefix("imagenet")
        assert f"/{pixels}/VIRTUAL_imagenet{pixels}" in reference.url


@pytest.mark.parametrize("preset", ["llamagen-b-256", "paper-fixed", "vqgan-imagenet"])
def test_presets_name_what_is_fetched(preset: str) -> None:
    assert load_preset(preset).rewards.loo_fid.reference in PUBLISHED


def test_a_run_whose_reference_is_not_fetched_says_where_it_should_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TESSERA_WEIGHTS", str(tmp_path))
    with pytest.raises(CheckpointError, match=FILE):
        read_reference(reference_file("imagenet256"))
