#!/usr/bin/env python3
"""Insert the call sites of `call_sites.py` into an unpacked llama.cpp, or fail naming the anchor that moved.

    patch_llama_cpp.py TREE            apply (a second run changes nothing)
    patch_llama_cpp.py TREE --diff     print the unified diff, write nothing
    patch_llama_cpp.py TREE --check    exit 1 if that diff is not the committed llama_cpp.patch
    patch_llama_cpp.py TREE --update   write llama_cpp.patch

TREE may be pristine or already patched by the same call sites. Nothing is written unless every call site fits.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMITTED_DIFF = HERE / "llama_cpp.patch"


class PatchError(Exception):
    """A call site does not fit the tree. The message names the file, the call site and its anchor."""


@dataclass(frozen=True)
class CallSite:
    """One insertion.

    name:   short unique name, used in messages.
    file:   path inside the llama.cpp tree.
    inside: whole lines that open the enclosing function (or block); must occur exactly once in the file.
    anchor: whole lines that must occur exactly once between `inside` (included) and the first line after it that begins
            with "}" (included; the end of the file if there is none).
    where:  "before" or "after" the anchor, or "replace" (only where C leaves no other way, such as an enum's last
            value).
    insert: the whole lines to insert; always ends with a newline.
    """

    name: str
    file: str
    inside: str
    anchor: str
    where: str
    insert: str

    def __post_init__(self) -> None:
        if self.where not in ("before", "after", "replace"):
            raise PatchError(f"call site '{self.name}': where is '{self.where}', not before, after or replace.")
        for field in ("inside", "anchor", "insert"):
            if not getattr(self, field).endswith("\n"):
                raise PatchError(f"call site '{self.name}': {field} is not made of whole lines.")

    @property
    def patched(self) -> str:
        """The text that stands in a patched file where `anchor` stood."""
        if self.where == "before":
            return self.insert + self.anchor
        if self.where == "after":
            return self.anchor + self.insert
        return self.insert


def count_lines(text: str, lines: str) -> list[int]:
    """Offsets at which `lines` (whole lines) occur in `text`, beginning at the start of a line."""
    found, at = [], text.find(lines)
    while at >= 0:
        if at == 0 or text[at - 1] == "\n":
            found.append(at)
        at = text.find(lines, at + 1)
    return found


def region(text: str, site: CallSite) -> tuple[int, int]:
    """(begin, end) of the enclosing function of `site`; PatchError unless `inside` occurs exactly once."""
    found = count_lines(text, site.inside)
    if len(found) != 1:
        raise PatchError(
            f"{site.file}: call site '{site.name}': the opening line {site.inside.strip()!r} occurs {len(found)} "
            "times, "
            "not once; upstream changed, so update call_sites.py."
        )
    begin = found[0]
    end = text.find("\n}", begin + len(site.inside) - 1)
    if site.where == "before" and text[:begin].endswith(site.insert):
        begin -= len(site.insert)  # patched already, right before the opening line, which is the anchor
    if end < 0:
        return begin, len(text)
    newline = text.find("\n", end + 1)
    return begin, len(text) if newline < 0 else newline + 1


def swap(text: str, site: CallSite, old: str, new: str) -> str:
    """Replace `old`, which must occur exactly once in the enclosing function of `site`, by `new`."""
    begin, end = region(text, site)
    found = count_lines(text[begin:end], old)
    if len(found) != 1:
        raise PatchError(
            f"{site.file}: call site '{site.name}': the anchor {site.anchor.strip()!r} occurs {len(found)} times after "
            f"{site.inside.strip()!r}, not once; upstream changed, so update call_sites.py."
        )
    at = begin + found[0]
    return text[:at] + new + text[at + len(old) :]


def revert_text(text: str, sites: list[CallSite]) -> str:
    """`text` without the insertions of `sites`: patched or pristine in, pristine out.

    A replaced anchor is gone from a patched file, so its own text tells; an insertion is looked for beside its anchor.
    """
    for site in reversed(sites):
        begin, end = region(text, site)
        if count_lines(text[begin:end], site.patched):
            text = swap(text, site, site.patched, site.anchor)
    return text


def patch_text(text: str, sites: list[CallSite]) -> str:
    """Pristine text of one file with all its `sites` inserted; PatchError if one does not fit exactly once."""
    for site in sites:
        text = swap(text, site, site.anchor, site.patched)
    return text


def sites_by_file(sites: list[CallSite]) -> dict[str, list[CallSite]]:
    """Call sites grouped by file, in the order of the list; PatchError on a repeated name."""
    grouped: dict[str, list[CallSite]] = {}
    names = set()
    for site in sites:
        if site.name in names:
            raise PatchError(f"call site '{site.name}' is listed twice; give every call site its own name.")
        names.add(site.name)
        grouped.setdefault(site.file, []).append(site)
    return grouped


def patched_files(tree: Path, sites: list[CallSite]) -> dict[str, tuple[str, str]]:
    """{file: (pristine text, patched text)} of every file with a call site; raises PatchError, writes nothing."""
    result = {}
    for file, of_file in sites_by_file(sites).items():
        path = tree / file
        if not path.is_file():
            raise PatchError(f"{file}: no such file in {tree}; is this the root of the pinned llama.cpp?")
        with open(path, encoding="utf-8", newline="") as f:
            pristine = revert_text(f.read(), of_file)
        result[file] = (pristine, patch_text(pristine, of_file))
    return result


def unified_diff(files: dict[str, tuple[str, str]]) -> str:
    """The diff of `patched_files` as `git diff` prints it, less the index lines."""
    lines: list[str] = []
    for file in sorted(files):
        pristine, patched = (text.splitlines(keepends=True) for text in files[file])
        lines += difflib.unified_diff(pristine, patched, f"a/{file}", f"b/{file}", n=2)
    return "".join(lines)


def apply(tree: Path, sites: list[CallSite]) -> list[str]:
    """Patch `tree` in place and return the files that changed (none on a second run)."""
    changed = []
    for file, (_, patched) in patched_files(tree, sites).items():
        path = tree / file
        if path.read_bytes() != patched.encode():
            path.write_bytes(patched.encode())
            changed.append(file)
    return changed


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tree", type=Path, help="root of an unpacked llama.cpp")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--diff", action="store_true", help="print the diff, write nothing")
    mode.add_argument("--check", action="store_true", help="compare the diff with the committed one, write nothing")
    mode.add_argument("--update", action="store_true", help="write the committed diff")
    args = parser.parse_args(argv)

    from call_sites import CALL_SITES

    try:
        diff = unified_diff(patched_files(args.tree, CALL_SITES))
        added = sum(line.startswith("+") and not line.startswith("+++") for line in diff.splitlines())
        if args.diff:
            sys.stdout.write(diff)
        elif args.update:
            COMMITTED_DIFF.write_text(diff)
            print(f"{COMMITTED_DIFF.name}: {added} upstream lines.")
        elif args.check:
            committed = COMMITTED_DIFF.read_text() if COMMITTED_DIFF.exists() else ""
            if committed != diff:
                sys.stdout.writelines(
                    difflib.unified_diff(
                        committed.splitlines(True), diff.splitlines(True), "committed", "from call_sites.py"
                    )
                )
                raise PatchError(
                    f"{COMMITTED_DIFF.name} is not what call_sites.py makes; run with --update and commit it."
                )
            print(f"{COMMITTED_DIFF.name} matches: {added} upstream lines.")
        else:
            changed = apply(args.tree, CALL_SITES)
            print(f"{len(CALL_SITES)} call sites, {len(changed)} files changed.")
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # call_sites.py imports CallSite from this module by name: let that name mean this very module, not a second copy.
    sys.modules["patch_llama_cpp"] = sys.modules["__main__"]
    sys.path.insert(0, str(HERE))
    sys.exit(main(sys.argv[1:]))
