"""A wheel of a mirror in place of a build: what installing a source archive looks for first.

Nothing is fetched unless `FLASH_ATTN_WHEEL_MIRROR` says from where. A mirror that does not answer,
or whose file is not what its manifest says, ends the installation: going on without would leave a
package without kernels in the installer's cache.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Optional

from build_tools import arch, choose_wheel, download, kernels, manifest
from build_tools.choose_wheel import Choice, Here, TorchHere
from build_tools.download import DownloadError
from build_tools.manifest import Entry
from build_tools.messages import announce, log
from build_tools.ninja import BuildError
from build_tools.paths import ROOT, activated_folders, env, package_folders, truth

AUTO, PREBUILT, SOURCE = "auto", "prebuilt", "source"
# The wheels of this release, as the manifest was when the source archive was made; see
# docs/mirrors.md. Where it is there, no other file is taken, whatever a mirror says.
KNOWN = Path(__file__).with_name(manifest.FILE)
MANY = 8
WAYS_OUT = (
    f"{env.FLASH_ATTN_BUILD.name}=source compiles instead, and "
    f"{env.FLASH_ATTENTION_SKIP_CUDA_BUILD.name}=TRUE installs the package without kernels"
)


@dataclass(frozen=True)
class Mirror:
    """A mirror that could be read: where it stands, and what it has for this environment."""

    base: str
    choice: Choice

    def url(self, entry: Entry) -> str:
        return download.join(self.base, entry.path)


def mode() -> str:
    """What `FLASH_ATTN_BUILD` says, nothing in particular where kernels are switched off.

    ValueError if another switch says the opposite.
    """
    chosen = env.FLASH_ATTN_BUILD.choice(AUTO, PREBUILT, SOURCE)
    if env.FLASH_ATTENTION_SKIP_CUDA_BUILD.is_true():
        return AUTO
    force = env.FLASH_ATTENTION_FORCE_BUILD
    if chosen == PREBUILT and force.is_true():
        raise ValueError(
            f"{env.FLASH_ATTN_BUILD.name}={chosen} and {force.name}=TRUE contradict each other"
        )
    return chosen


def is_sought() -> bool:
    """Whether mirrors are asked at all.

    Changed sources must not be answered with a wheel of the unchanged ones, so a checkout has to
    ask for it. A source archive bears PKG-INFO.
    """
    switches = (env.FLASH_ATTENTION_SKIP_CUDA_BUILD, env.FLASH_ATTENTION_FORCE_BUILD)
    chosen = mode()
    if chosen == SOURCE or any(switch.is_true() for switch in switches):
        return False
    if chosen == PREBUILT or env.FLASH_ATTN_WHEEL_MIRROR.text() is None:
        return chosen == PREBUILT
    is_archive = (ROOT / "PKG-INFO").exists()
    if not is_archive:
        log(
            f"these sources may have been changed, so {env.FLASH_ATTN_WHEEL_MIRROR.name} is not "
            f"asked; {env.FLASH_ATTN_BUILD.name}=prebuilt asks it"
        )
    return is_archive


@cache
def offers(may_compile: bool) -> tuple[Mirror, ...]:
    """The mirrors with a wheel that fits; none if the installation goes on without.

    Args:
        may_compile: whether kernels are compiled where no wheel fits.

    Raises:
        BuildError: no mirror can be read; no wheel fits and nothing is compiled instead.
    """
    if not is_sought():
        return ()
    named = env.FLASH_ATTN_WHEEL_MIRROR.words()
    if not named:
        raise _error(
            f"{env.FLASH_ATTN_BUILD.name}=prebuilt needs {env.FLASH_ATTN_WHEEL_MIRROR.name}: an "
            "address or a folder with wheels"
        )
    wanted = environment()
    read: list[Mirror] = []
    faults: list[str] = []
    for name in named:
        try:
            base = download.address(name)
            has = entries(base)
        # Beside DownloadError and ManifestError, what Python says of strange names and nested JSON.
        except (RuntimeError, ValueError) as error:
            faults.append(f"{download.shown(name)}: {error}")
        else:
            read.append(Mirror(base, choose_wheel.choose(has, wanted)))
    if not read:
        raise _error("no mirror of wheels can be used:", *faults)
    for fault in faults:
        log(f"left out: {fault}")
    found = tuple(mirror for mirror in read if mirror.choice.best is not None)
    if not found:
        lines = no_wheel(wanted, read)
        if not may_compile:
            raise _error(*lines)
        announce("\n  ".join(lines))
    return found


def _error(*lines: str) -> BuildError:
    return BuildError("\n  ".join(lines) + f"\nhint: {WAYS_OUT}")


def environment() -> Here:
    """What a wheel has to serve here."""
    local = env.FLASH_ATTN_LOCAL_VERSION.text()
    version = truth("_version").__version__ + (f"+{local}" if local else "")
    named = env.FLASH_ATTN_CUDA_ARCHS.text()
    gpus = arch.wanted(None) or []
    # Containers list every GPU that torch is built for; what no kernel serves cannot be asked for.
    served = [gpu for gpu in gpus if kernels.is_served(gpu)]
    if named is not None and gpus and not served:
        raise _error(f"no kernel runs on {named}, which {env.FLASH_ATTN_CUDA_ARCHS.name} asks for")
    return choose_wheel.here(version, torch_here(), served)


def torch_here() -> Optional[TorchHere]:
    """The torch of the environment that is installed into, read and not imported; None without."""
    for folder in (*package_folders(), *activated_folders()):
        file = folder / "torch" / "version.py"
        if file.exists():
            told = dict(_constants(file))
            return TorchHere(told.get("__version__") or "", told.get("cuda"), str(folder))
    return None


def _constants(file: Path) -> Iterator[tuple[str, Optional[str]]]:
    """Names with the texts that a module gives them; nothing of one that cannot be read."""
    try:
        body = ast.parse(file.read_text("utf-8")).body
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and (
            value.value is None or isinstance(value.value, str)
        ):
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, value.value


def entries(base: str) -> list[Entry]:
    """The wheels of a mirror that these sources know by their hashes, or all if they know none."""
    has = manifest.parse(download.read(download.join(base, manifest.FILE)))
    if not KNOWN.exists():
        return list(has.values())
    known = manifest.parse(KNOWN.read_bytes())
    strange = [path for path, entry in has.items() if known.get(path) != entry]
    if strange:
        log(
            f"{download.shown(base)}: left out {len(strange)} wheels that these sources do not "
            f"know by their hashes, such as {strange[0]}"
        )
    return [entry for path, entry in has.items() if known.get(path) == entry]


def no_wheel(wanted: Here, read: list[Mirror]) -> list[str]:
    """Which wheels there are, what differs, and what to run for one that has to be asked for."""
    lines = [f"no wheel of flash-attn {wanted.version} for every torch serves {wanted}"]
    for mirror in read:
        for entry in mirror.choice.bound[:1]:
            lines.append(
                f"one for torch {entry.torch} alone does. pip keeps what it makes of a source "
                "archive, for any torch, so it has to be asked for by its address: `pip install "
                f"'flash-attn @ {download.shown(mirror.url(entry))}#sha256={entry.sha256}'`"
            )
    against = [line for mirror in read for line in mirror.choice.against]
    lines += against[:MANY]
    if len(against) > MANY:
        lines.append(f"and {len(against) - MANY} that differ in as much or more")
    if not against and len(lines) == 1:
        lines.append("the mirrors have none at all")
    return lines


def obtain(folder: Path, may_compile: bool) -> Optional[str]:
    """Puts the best wheel into a folder and returns its name; None if there is to be none.

    Raises:
        BuildError: none of those that fit can be had whole.
    """
    faults = []
    for mirror in offers(may_compile):
        entry = mirror.choice.best
        assert entry is not None
        url = mirror.url(entry)
        try:
            announce(f"taking the wheel {download.shown(url)}, {entry.size / 1e6:.1f} MB")
            download.fetch(url, folder / entry.name, entry.size, entry.sha256)
            return entry.name
        except DownloadError as error:
            faults.append(str(error))
    if faults:
        raise _error("the wheel cannot be had:", *faults)
    return None
