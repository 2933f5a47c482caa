"""Wheels with one thing wrong, each for one rule of the audit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from native_tools import native, needs
from small_wheels import HERE

from build_tools.assemble import INDEX, SBOM
from build_tools.zip_file import Entries, Entry, read, wheel_order, write

SHIM = f"flash_attn/{native.shim_name(HERE)}"
HOST = f"flash_attn/{native.HOST_LIBRARY}"
CUBIN = "flash_attn/kernels/sm_90/flash_delta_fp16.cubin"
OTHER_CUBIN = "flash_attn/kernels/sm_90/flash_delta_bf16.cubin"


@dataclass
class Draft:
    """A wheel while it is spoiled.

    Args:
        entries: its files.
        name: of the file.
        folder: for what has to be compiled.
        is_sealed: whether the bill and RECORD are made to agree with the files again.
    """

    entries: Entries
    name: str
    folder: Path
    is_sealed: bool = True

    @property
    def info(self) -> str:
        return next(name for name in self.entries if name.endswith("/RECORD")).rpartition("/")[0]

    def text(self, name: str) -> str:
        return self.entries[self.path(name)].data.decode()

    def path(self, name: str) -> str:
        """The full name of a file of dist-info, or of any other."""
        return name if name in self.entries else f"{self.info}/{name}"

    def put(self, name: str, data: bytes) -> None:
        self.entries[self.path(name) if self.path(name) in self.entries else name] = Entry(data)

    def change(self, name: str, pattern: str, text: str) -> None:
        """Replaces one match in a text file."""
        changed, count = re.subn(pattern, text, self.text(name), count=1, flags=re.MULTILINE)
        assert count == 1, (name, pattern)
        self.put(name, changed.encode())

    def seal(self) -> None:
        """Makes the bill and RECORD agree with the files."""
        bill = json.loads(self.text(SBOM))
        parts = [part for part in bill["components"] if "components" in part]
        compiled = {x for x in self.entries if x.endswith((".so", ".cubin", ".ptx")) or ".so." in x}
        for part in parts:
            part["components"] = [x for x in part["components"] if x["name"] in compiled]
            compiled -= {x["name"] for x in part["components"]}
        parts[-1]["components"] += [{"type": "file", "name": name} for name in sorted(compiled)]
        for file in (file for part in parts for file in part["components"]):
            digest = self.entries[file["name"]].sha256
            file["hashes"] = [{"alg": "SHA-256", "content": digest}]
        self.put(SBOM, json.dumps(bill).encode())
        own = self.path("RECORD")
        names = [name for name in wheel_order(self.entries) if name != own]
        lines = [f"{name},{self.entries[name].record}" for name in names]
        self.put(own, "\n".join([*lines, f"{own},,", ""]).encode())

    def write(self) -> Path:
        if self.is_sealed:
            self.seal()
        file = self.folder / self.name
        file.write_bytes(write(self.entries, wheel_order(self.entries)))
        return file


def library(draft: Draft, text: str, *options: str) -> bytes:
    """A shared library that needs nothing but what is asked for."""
    source, file = draft.folder / "library.cpp", draft.folder / "library.so"
    source.write_text(text, "utf-8")
    command = [needs("g++"), "-shared", "-fPIC", "-nostdlib", str(source), *options]
    subprocess.run([*command, "-o", str(file)], check=True)
    return file.read_bytes()


def linked_with(draft: Draft, name: str, symbol: str, version: str) -> bytes:
    """A library that asks another one, by its name, for a version of a function."""
    script, other = draft.folder / "versions", draft.folder / name
    script.write_text(f"{version} {{ global: *; }};\n", "utf-8")
    options = (f"-Wl,-soname,{name}", f"-Wl,--version-script={script}")
    other.write_bytes(library(draft, f'extern "C" void {symbol}() {{}}', *options))
    text = f'extern "C" void {symbol}(); void ask() {{ {symbol}(); }}'
    return library(draft, text, str(other))


def asking(draft: Draft, symbol: str) -> bytes:
    return library(draft, f'extern "C" void {symbol}(); void ask() {{ {symbol}(); }}')


# file_name, requirements, record, modules, licence


def version_in_metadata(draft: Draft) -> None:
    draft.change("METADATA", r"^Version: .*", "Version: 2.8.4")


def tag_of_a_python(draft: Draft) -> None:
    draft.change("WHEEL", r"^Tag: py3-none", "Tag: cp311-cp311")


def marked_as_pure(draft: Draft) -> None:
    draft.change("WHEEL", r"^Root-Is-Purelib: false", "Root-Is-Purelib: true")


def no_python_named(draft: Draft) -> None:
    draft.change("METADATA", r"^Requires-Python: .*\n", "")


def torches_up_to_one(draft: Draft) -> None:
    draft.change("METADATA", r"^Requires-Dist: torch.*", "Requires-Dist: torch<3")


def torch_that_nobody_knows(draft: Draft) -> None:
    draft.change("METADATA", r"^Requires-Dist: torch.*", "Requires-Dist: torch==2.99.*")


def a_hash_in_record(draft: Draft) -> None:
    draft.is_sealed = False
    draft.change("RECORD", r"^flash_attn/__init__.py,sha256=.", "flash_attn/__init__.py,sha256=_")


def a_line_less_in_record(draft: Draft) -> None:
    draft.is_sealed = False
    draft.change("RECORD", r"^flash_attn/__init__.py.*\n", "")


def a_module_of_tests(draft: Draft) -> None:
    draft.put("tests/__init__.py", b"")


def a_module_less(draft: Draft) -> None:
    del draft.entries["flash_attn_2_cuda.py"]


def another_licence(draft: Draft) -> None:
    draft.change("METADATA", r"^License-Expression: .*", "License-Expression: MIT")


def a_licence_that_stayed_home(draft: Draft) -> None:
    del draft.entries[draft.path("licenses/LICENSE")]


# paths, size, bill_of_materials, reproducible


def a_long_path(draft: Draft) -> None:
    draft.put(f"flash_attn/{'long_' * 20}.py", b"")


def a_path_with_a_blank(draft: Draft) -> None:
    draft.put("flash_attn/two words.py", b"")


def paths_that_differ_in_case(draft: Draft) -> None:
    draft.put("flash_attn/INFO.py", b"")


def a_file_that_the_bill_has_not(draft: Draft) -> None:
    draft.seal()
    draft.is_sealed = False
    draft.put("flash_attn/notes.bin", b"")
    record = draft.text("RECORD") + f"flash_attn/notes.bin,{Entry(b'').record}\n"
    draft.put("RECORD", record.encode())


def a_bill_of_another_build(draft: Draft) -> None:
    bill = draft.text(SBOM)
    draft.seal()
    draft.is_sealed = False
    wrong = re.sub(r'("content": ")[0-9a-f]{8}', r"\g<1>00000000", bill, count=1)
    record = draft.text("RECORD").replace(
        Entry(draft.text(SBOM).encode()).record, Entry(wrong.encode()).record
    )
    draft.put(SBOM, wrong.encode())
    draft.put("RECORD", record.encode())


def a_path_of_the_machine(draft: Draft) -> None:
    data = draft.entries[CUBIN].data + b"\0/builds/me/csrc/device/delta.cuh\0"
    draft.put(CUBIN, data)


# python_tag, platform_tag, vendored


def a_python_extension(draft: Draft) -> None:
    draft.put(SHIM, library(draft, 'extern "C" void PyInit_flash() {}'))


def another_machine(draft: Draft) -> None:
    data = bytearray(draft.entries[HOST].data)
    data[18:20] = b"\xf3\x00"  # RISC-V
    draft.put(HOST, bytes(data))


def a_newer_glibc(draft: Draft) -> None:
    draft.put(SHIM, linked_with(draft, "libc.so.6", "dlsym", "GLIBC_2.34"))


def the_cuda_runtime(draft: Draft) -> None:
    draft.put("flash_attn/libcudart.so.12", library(draft, ""))


def linked_with_the_cuda_runtime(draft: Draft) -> None:
    other = draft.folder / "libcudart.so.12"
    other.write_bytes(library(draft, "", f"-Wl,-soname,{other.name}"))
    draft.put(SHIM, library(draft, "", "-Wl,--no-as-needed", str(other)))


def a_run_path_of_the_machine(draft: Draft) -> None:
    draft.put(SHIM, library(draft, "", "-Wl,-rpath,/usr/local/lib"))


# shims_for_torches, architectures, symbols, stable_abi


def no_shim(draft: Draft) -> None:
    for name in [name for name in draft.entries if "/_shim_" in name]:
        del draft.entries[name]


def a_shim_too_many(draft: Draft) -> None:
    name = native.shim_file((2, 4) if HERE.is_stable else (2, 10), True)
    draft.put(f"flash_attn/{name}", library(draft, ""))


def a_kernel_less(draft: Draft) -> None:
    del draft.entries[CUBIN]
    draft.change(INDEX, r"^delta .* flash_delta_fp16 .*\n", "")


def a_kernel_that_the_table_has_not(draft: Draft) -> None:
    draft.change(INDEX, r"^delta .* flash_delta_fp16 .*\n", "")


def a_kernel_under_another_name(draft: Draft) -> None:
    draft.put(CUBIN, draft.entries[OTHER_CUBIN].data)


def a_kernel_for_another_gpu(draft: Draft) -> None:
    data = bytearray(draft.entries[CUBIN].data)
    data[48:52] = data[48:52].replace(b"\x5a", b"\x50")  # 90 as 80
    draft.put(CUBIN, bytes(data))


def a_kernel_that_is_none(draft: Draft) -> None:
    draft.put(CUBIN, b"\x7fELF\x02\x01 and no more")


def a_bill_for_another_gpu(draft: Draft) -> None:
    draft.change(SBOM, r'"flash-attn:arch",\s*"value": "90"', '"flash-attn:arch", "value": "80"')


def a_symbol_that_torch_has_not(draft: Draft) -> None:
    draft.put(SHIM, asking(draft, "torch_absent"))


def a_symbol_of_cplusplus(draft: Draft) -> None:
    draft.put(SHIM, asking(draft, "_ZN3c106detail14torchCheckFailEPKcS2_jS2_"))


Spoil = Callable[[Draft], None]

SPOILED: dict[str, tuple[Spoil, ...]] = {
    "file_name": (version_in_metadata, tag_of_a_python, marked_as_pure),
    "requirements": (no_python_named, torches_up_to_one, torch_that_nobody_knows),
    "record": (a_hash_in_record, a_line_less_in_record),
    "modules": (a_module_of_tests, a_module_less),
    "licence": (another_licence, a_licence_that_stayed_home),
    "paths": (a_long_path, a_path_with_a_blank, paths_that_differ_in_case),
    "bill_of_materials": (a_file_that_the_bill_has_not, a_bill_of_another_build),
    "reproducible": (a_path_of_the_machine,),
    "python_tag": (a_python_extension,),
    "platform_tag": (another_machine, a_newer_glibc),
    "vendored": (the_cuda_runtime, linked_with_the_cuda_runtime, a_run_path_of_the_machine),
    "shims_for_torches": (no_shim, a_shim_too_many),
    "architectures": (
        a_kernel_less,
        a_kernel_that_the_table_has_not,
        a_kernel_under_another_name,
        a_kernel_for_another_gpu,
        a_kernel_that_is_none,
        a_bill_for_another_gpu,
    ),
    "symbols": (a_symbol_that_torch_has_not,),
    "stable_abi": (a_symbol_of_cplusplus,),
}


def spoiled(wheel: Path, folder: Path, spoil: Spoil) -> Path:
    """A copy of a wheel with that one thing wrong."""
    draft = Draft(read(wheel), wheel.name, folder)
    spoil(draft)
    return draft.write()


def copied(wheel: Path, folder: Path, path: str) -> Path:
    """A copy that stands where the matrix has it."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(wheel, target)
    return target
