"""Mirrors: what stands in them, that they only grow, what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from stand_ins import SBOM, UNIVERSAL, make_wheel, serving, with_a_bad_stream

from build_tools import download, manifest, matrix_facts, mirror, serve
from build_tools.__main__ import main

PLAIN = "whl/cu12/torch2.8/flash-attn/flash_attn-2.8.3-py3-none-manylinux_2_28_x86_64.whl"
SLIM = "whl/cu13/torch2.9/sm90/flash-attn/flash_attn-2.8.3-py3-none-win_amd64.whl"
PUBLISHED = (
    "whl/cu12/flash-attn/flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
)
WHEELS = {UNIVERSAL: "", PLAIN: "2.8", SLIM: "2.9", PUBLISHED: "2.8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels, one of each kind, as `build` leaves it."""
    folder = tmp_path_factory.mktemp("source")
    for path, torch in WHEELS.items():
        make_wheel(folder, path, torch, text=path)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of them; not to be written to."""
    folder = tmp_path_factory.mktemp("mirror")
    assert mirror.mirror(str(source), folder) == (4, 4)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Links(HTMLParser):
    """The links of a page with their attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append({name: text or "" for name, text in attrs})


def test_a_mirror_has_every_wheel_in_its_root_and_in_the_manifest(made: Path) -> None:
    entries = mirror.read_manifest(made)
    assert set(entries) == set(WHEELS)
    for path, torch in WHEELS.items():
        entry = entries[path]
        assert entry.sha256 == hashlib.sha256((made / path).read_bytes()).hexdigest()
        assert entry.size == (made / path).stat().st_size
        assert (entry.torch or "") == torch
        assert entry.archs == ("80", "90", "120", "80+ptx")
    assert {path: entry.cuda for path, entry in entries.items()} == {
        UNIVERSAL: ("12", "13"),
        PLAIN: ("12",),
        SLIM: ("13",),
        PUBLISHED: ("12",),
    }
    assert entries[PUBLISHED].tags == ("cp312-cp312-linux_x86_64",)


def test_every_root_has_pages_with_relative_links_and_hashes(made: Path) -> None:
    for path in WHEELS:
        file = made / path
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        for page in (file.with_name("index.html"), file.parents[1] / "find-links.html"):
            link = next(x for x in Links(page).found if digest in x["href"])
            href, _, fragment = link["href"].partition("#")
            assert (page.parent / href.replace("%2B", "+")).resolve() == file.resolve()
            assert fragment == f"sha256={digest}"
            core = file.with_name(f"{file.name}.metadata").read_bytes()
            assert link["data-core-metadata"] == f"sha256={hashlib.sha256(core).hexdigest()}"
            assert link["data-requires-python"] == ">=3.9"
        root = Links(file.parents[1] / "index.html").found
        assert [link["href"] for link in root] == ["flash-attn/"]
        page = json.loads(file.with_name("index.json").read_text("utf-8"))
        row = next(x for x in page["files"] if x["filename"] == file.name)
        assert row["hashes"] == {"sha256": digest}
        assert row["size"] == file.stat().st_size
        assert page["meta"]["api-version"] == "1.1"


def test_bills_of_materials_and_sums_stand_beside(made: Path) -> None:
    for path in WHEELS:
        assert (made / f"{path}.flash_attn.cdx.json").read_bytes() == SBOM
    lines = (made / "SHA256SUMS").read_text("utf-8").splitlines()
    told = {path: digest for digest, path in (line.split("  ") for line in lines)}
    constant = {p for p in files_of(made) if ".whl" in p}
    assert told == {p: hashlib.sha256((made / p).read_bytes()).hexdigest() for p in constant}
    program = shutil.which("sha256sum")
    if program is not None:
        subprocess.run([program, "--check", "--quiet", "SHA256SUMS"], cwd=made, check=True)


def test_a_flat_folder_gives_the_same_places(tmp_path: Path) -> None:
    for path in (UNIVERSAL, PUBLISHED):
        make_wheel(tmp_path / "dist", path.rpartition("/")[2], WHEELS[path])
    assert mirror.mirror(str(tmp_path / "dist"), tmp_path / "to") == (2, 2)
    assert set(mirror.read_manifest(tmp_path / "to")) == {UNIVERSAL, PUBLISHED}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        (["--torch", "2.8"], {UNIVERSAL, PLAIN, PUBLISHED}),
        (["--torch", "2.10"], {UNIVERSAL}),
        (["--cuda", "13"], {UNIVERSAL, SLIM}),
        (["--platform", "win_amd64"], {SLIM}),
        (["--python", "3.12"], set(WHEELS)),
        (["--python", "3.13t", "--python", "3.9"], {UNIVERSAL, PLAIN, SLIM}),
        (["--cuda", "12", "--platform", "linux_x86_64", "--torch", "2.8"], set(WHEELS) - {SLIM}),
    ],
)
def test_options_take_what_serves_them(
    source: Path, tmp_path: Path, options: list[str], taken: set[str]
) -> None:
    assert main(["mirror", "--from", str(source), "--to", str(tmp_path), *options]) == 0
    assert set(mirror.read_manifest(tmp_path)) == taken
    assert main(["verify", str(tmp_path)]) == 0


def test_a_mirror_grows_and_repeats_without_a_change(source: Path, tmp_path: Path) -> None:
    mirror.mirror(str(source), tmp_path, mirror.Wanted(torches=("2.10",)))
    first = files_of(tmp_path)
    assert mirror.mirror(str(source), tmp_path) == (3, 4)
    second = files_of(tmp_path)
    assert all(second[path] == first[path] for path in first if ".whl" in path)
    assert mirror.mirror(str(source), tmp_path) == (0, 4)
    assert files_of(tmp_path) == second


def test_another_wheel_under_the_same_name_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.mirror(str(source), tmp_path / "to")
    before = files_of(tmp_path / "to")
    make_wheel(tmp_path / "other", text="another")
    assert main(["mirror", "--from", str(tmp_path / "other"), "--to", str(tmp_path / "to")]) == 1
    assert "a mirror only grows" in capsys.readouterr().err
    assert files_of(tmp_path / "to") == before


@pytest.mark.parametrize("step", ["copyfile", "write", "publish"])
def test_a_run_that_is_cut_off_leaves_a_valid_mirror(
    source: Path, tmp_path: Path, step: str
) -> None:
    mirror.mirror(str(source), tmp_path, mirror.Wanted(torches=("2.10",)))
    before = files_of(tmp_path)
    # Ended from outside amid the new files: nothing of the program runs any more. Two writes are
    # of what stands beside the wheel that is there.
    last = {"copyfile": 3, "write": 5, "publish": 1}[step]
    program = f"""
import os
from build_tools import mirror
owner = mirror.shutil if {step!r} == "copyfile" else mirror
real, calls = getattr(owner, {step!r}), []
def cut_off(*arguments):
    calls.append(arguments)
    if len(calls) == {last}:
        if {step!r} == "copyfile":
            arguments[1].write_bytes(b"half a wheel")
        os._exit(9)
    return real(*arguments)
setattr(owner, {step!r}, cut_off)
mirror.mirror({str(source)!r}, mirror.Path({str(tmp_path)!r}))
"""
    root = Path(mirror.__file__).parents[1]
    child = subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
    assert child.returncode == 9
    after = files_of(tmp_path)
    assert all(after[path] == data for path, data in before.items())
    assert mirror.mirror(str(source), tmp_path)[1] == 4
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (PLAIN, "has sha256"),
        (f"{PLAIN}.metadata", "is not what is in the wheel"),
        (f"{PLAIN}.flash_attn.cdx.json", "is not what is in the wheel"),
        ("whl/flash-attn/index.html", "is not what follows from wheels.json"),
        ("whl/cu12/torch2.8/flash-attn/index.json", "is not what follows from wheels.json"),
        ("SHA256SUMS", "is not what follows from wheels.json"),
        ("whl/flash-attn/more.txt", "is not known to wheels.json"),
        ("wheels.json", "wheels.json is no JSON"),
    ],
)
def test_verify_finds_a_changed_byte(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, told: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    assert main(["verify", str(folder)]) == 0
    with (folder / path).open("ab") as file:
        file.write(b"}")
    assert main(["verify", str(folder)]) == 1
    assert told in capsys.readouterr().err
    if path not in ("wheels.json", "whl/flash-attn/more.txt"):
        (folder / path).unlink()
        assert main(["verify", str(folder)]) == 1
        assert f"{path} is missing" in capsys.readouterr().err


@pytest.mark.parametrize("is_copied", [False, True])
def test_damaged_files_are_put_in_place_anew(
    source: Path,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_copied: bool,
) -> None:
    folder = spoiled(made, tmp_path, SLIM, f"{PLAIN}.metadata", f"{PUBLISHED}.flash_attn.cdx.json")
    (folder / UNIVERSAL).unlink()
    assert mirror.mirror(str(made if is_copied else source), folder) == (0, 4)
    told = capsys.readouterr().err
    assert [path for path in WHEELS if f"put in place anew: {path}" in told] == [UNIVERSAL, SLIM]
    assert files_of(folder) == files_of(made)


def test_damaged_files_that_cannot_be_had_anew_are_told_and_not_signed(
    source: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoiled(made, tmp_path, SLIM, f"{SLIM}.metadata")
    mirror.mirror(str(source), folder, mirror.Wanted(torches=("2.8",)))
    assert f"left so: {SLIM}" in capsys.readouterr().err
    assert (folder / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()
    assert main(["verify", str(folder)]) == 1


def spoiled(made: Path, tmp_path: Path, *paths: str) -> Path:
    """A copy of a mirror in which files have a byte more."""
    folder = shutil.copytree(made, tmp_path / "spoiled")
    for path in paths:
        with (folder / path).open("ab") as file:
            file.write(b"}")
    return folder


@pytest.mark.parametrize(
    ("path", "torch", "told"),
    [
        (PLAIN.rpartition("/")[2], "2.8", "its name does not tell the CUDA version"),
        ("whl/flash-attn/" + PLAIN.rpartition("/")[2], "2.8", "in an index of every torch"),
        ("whl/Cu 12/flash-attn/" + PLAIN.rpartition("/")[2], "", "must stand in a folder such as"),
    ],
)
def test_a_wheel_without_a_place_is_refused(
    tmp_path: Path, path: str, torch: str, told: str
) -> None:
    make_wheel(tmp_path / "from", path, torch)
    with pytest.raises(manifest.ManifestError, match=re.escape(told)):
        mirror.mirror(str(tmp_path / "from"), tmp_path / "to")


def test_what_is_no_wheel_of_the_project_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    (folder / "einops-0.8.1-py3-none-any.whl").touch()
    (folder / "flash_attn-2.8.3-0torch2.8-py3-none-linux_x86_64.whl").touch()
    command = ["mirror", "--from", str(folder), "--to", str(tmp_path / "to")]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "left out: einops-0.8.1" in told
    assert "as its build number says, and left out: flash_attn-2.8.3-0torch2.8-" in told
    assert "has no wheel of flash-attn that fits" in told
    bad_stream = with_a_bad_stream(make_wheel(tmp_path).read_bytes())
    for data in (b"no zip", bad_stream):
        (folder / "flash_attn-2.8.3-py3-none-any.whl").write_bytes(data)
        assert main(command) == 1
        assert "cannot be read as a wheel" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "to")]) == 1
    assert "is no mirror" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        {"path": "../../flash-attn/flash_attn-2.8.3-py3-none-any.whl"},
        {"path": "/whl/flash-attn/flash_attn-2.8.3-py3-none-any.whl"},
        {"path": "whl/../flash-attn/flash_attn-2.8.3-py3-none-any.whl"},
        {"path": "whl/flash-attn/other-2.8.3-py3-none-any.whl"},
        {"sha256": "00"},
        {"size": "1"},
        {"tags": "py3-none-any"},
        {"torch": 2.8},
        {"torch": "main"},
        {"archs": ["hopper"]},
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused(made: Path, row: dict[str, object]) -> None:
    good = json.loads((made / "wheels.json").read_text("utf-8"))
    good["wheels"][0].update(row)
    with pytest.raises(manifest.ManifestError, match=r"wheels\.json"):
        manifest.parse(json.dumps(good).encode())


def test_a_mirror_is_copied_over_http_and_an_interrupted_download_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.01,) * 4)
    with serving(made) as (url, faults):
        faults.cut[".whl"] = (700, 3)
        faults.status["wheels.json"] = (503, 2)
        assert mirror.mirror(url, tmp_path) == (4, 4)
        ranges = [asked for path, asked, _ in faults.asked if path.endswith(".whl") and asked]
    assert ranges == ["bytes=700-", "bytes=1400-", "bytes=2100-"]
    assert files_of(tmp_path) == files_of(made)
    assert main(["mirror", "--from", str(made), "--to", str(tmp_path / "again")]) == 0
    assert files_of(tmp_path / "again") == files_of(made)


def test_a_mirror_is_copied_from_a_folder_beside_the_current_one(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    assert main(["mirror", "--from", made.name, "--to", str(tmp_path)]) == 0
    assert files_of(tmp_path) == files_of(made)


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--from", "https://[::1", "https://[::1 is no address"),
        ("--from", "file:mir", "file:mir: a folder must be absolute"),
        ("--python", "abc", "'abc' is no Python; one is written like 3.12"),
        ("--python", "2.7", "'2.7' is no Python"),
        ("--torch", "main", "'main' is no version"),
    ],
)
def test_options_that_say_nothing_are_named(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    text: str,
    told: str,
) -> None:
    command = ["mirror", "--to", str(tmp_path), "--from", str(source), option, text]
    assert main(command) == 1
    assert f"build_tools: {told}" in capsys.readouterr().err


def test_a_server_without_the_file_is_told_and_what_came_before_stays(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(made) as (url, faults):
        faults.status["win_amd64.whl"] = (404, 9)
        assert main(["mirror", "--from", url, "--to", str(tmp_path)]) == 1
    assert "HTTP status 404" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 0
    assert SLIM not in mirror.read_manifest(tmp_path)


def test_a_mirror_that_says_other_things_than_its_wheels_is_refused(
    made: Path, tmp_path: Path
) -> None:
    lying = tmp_path / "lying"
    shutil.copytree(made, lying)
    text = (lying / "wheels.json").read_text("utf-8")
    (lying / "wheels.json").write_text(text.replace('"torch": "2.8"', '"torch": "2.9"'), "utf-8")
    with pytest.raises(manifest.ManifestError, match="is not what the other mirror's"):
        mirror.mirror(str(lying), tmp_path / "to")
    assert main(["verify", str(lying)]) == 1


def test_constants_agree_with_the_matrix() -> None:
    facts = matrix_facts.load()
    assert tuple(facts.cuda) == manifest.EVERY_CUDA
    assert next(iter(facts.torch)) == manifest.OLDEST_TORCH
    assert facts.index == manifest.INDEX


def test_serve_answers_only_for_a_mirror(made: Path, tmp_path: Path) -> None:
    with pytest.raises(manifest.ManifestError, match="is no mirror"):
        serve.server(tmp_path)
    with serve.server(made) as server:
        assert server.server_address[0] == "127.0.0.1"
