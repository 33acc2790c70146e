"""Anchored insertion: every way in which upstream can move is refused by name, and the committed diff is what the pin
needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest

from tacq_export.runtime.source import cpp_ext_dir, fetch_sdist, load_patcher, source_tree

patcher, CALL_SITES = load_patcher()

TEXT = """\
int first(void) {
    one();
    two();
}

int second(void) {
    one();
    three();
}
"""


def site(
    where="after", anchor="    one();\n", insert="    ours();\n", inside="int second(void) {\n", name="call", file="a.c"
):
    return patcher.CallSite(name=name, file=file, inside=inside, anchor=anchor, where=where, insert=insert)


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "a.c").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("after", "int second(void) {\n    one();\n    ours();\n    three();\n}\n"),
        ("before", "int second(void) {\n    ours();\n    one();\n    three();\n}\n"),
        ("replace", "int second(void) {\n    ours();\n    three();\n}\n"),
    ],
)
def test_insertion_goes_to_the_named_function_only(tree, where, expected):
    assert patcher.apply(tree, [site(where)]) == ["a.c"]
    assert (tree / "a.c").read_text() == TEXT[: TEXT.index("int second")] + expected


@pytest.mark.parametrize("where", ["after", "before", "replace"])
@pytest.mark.parametrize("anchor", ["    one();\n", "int second(void) {\n"])
def test_a_second_run_changes_nothing_and_revert_restores_the_file(tree, where, anchor):
    """Also where the anchor is the opening line itself, so that an insertion before it stands outside the function."""
    if (where, anchor) == ("replace", "int second(void) {\n"):
        anchor = "    three();\n"  # an opening line that is replaced could not be found again
    sites = [site(where, anchor)]
    patcher.apply(tree, sites)
    once = (tree / "a.c").read_text()
    assert patcher.apply(tree, sites) == []
    assert (tree / "a.c").read_text() == once
    assert patcher.revert_text(once, sites) == TEXT
    assert patcher.revert_text(TEXT, sites) == TEXT


def test_several_sites_of_one_file_are_inserted_and_reverted_together():
    sites = [
        site(),
        site("before", "    three();\n", "    more();\n", name="more"),
        site("replace", "    two();\n", "    2();\n", "int first(void) {\n", "two"),
    ]
    patched = patcher.patch_text(TEXT, sites)
    assert (
        patched
        == "int first(void) {\n    one();\n    2();\n}\n\nint second(void) {\n    one();\n    ours();\n    more();\n  "
        "  three();\n}\n"
    )
    assert patcher.revert_text(patched, sites) == TEXT


def test_a_patched_file_takes_a_changed_call_site(tree):
    """As when call_sites.py gets one site more: the earlier ones are taken out and all are put in."""
    patcher.apply(tree, [site()])
    more = [site(), site("before", "    three();\n", "    more();\n", name="more")]
    assert patcher.apply(tree, more) == ["a.c"]
    assert (tree / "a.c").read_text() == patcher.patch_text(TEXT, more)


@pytest.mark.parametrize(
    ("changed", "times", "what"),
    [
        (TEXT.replace("int second(void) {\n    one();", "int second(void) {\n    ein();"), 0, "the anchor 'one();'"),
        (TEXT.replace("    three();\n", "    one();\n"), 2, "the anchor 'one();'"),
        (TEXT.replace("int second", "int third"), 0, "the opening line 'int second(void) {'"),
        (TEXT + TEXT, 2, "the opening line 'int second(void) {'"),
    ],
)
def test_a_moved_or_doubled_anchor_is_named_and_nothing_is_written(tree, changed, times, what):
    (tree / "a.c").write_text(changed)
    (tree / "b.c").write_text(TEXT)
    with pytest.raises(patcher.PatchError) as error:
        patcher.apply(tree, [site(file="b.c", name="good"), site(name="moved")])
    assert str(error.value).startswith("a.c: call site 'moved': ")
    assert what in str(error.value) and f"occurs {times} times" in str(error.value)
    assert (tree / "a.c").read_text() == changed
    assert (tree / "b.c").read_text() == TEXT, "a file was written though another did not fit"


def test_an_anchor_that_is_only_part_of_a_line_is_no_anchor(tree):
    (tree / "a.c").write_text(TEXT.replace("int second(void) {\n    one();", "int second(void) {\n    x    one();"))
    with pytest.raises(patcher.PatchError, match="occurs 0 times"):
        patcher.apply(tree, [site()])


def test_a_missing_file_is_named(tree):
    with pytest.raises(patcher.PatchError, match=r"^gone\.c: no such file in .*; is this the root"):
        patcher.apply(tree, [site(), site(file="gone.c", name="other")])
    assert (tree / "a.c").read_text() == TEXT


def test_a_name_used_twice_is_refused(tree):
    with pytest.raises(patcher.PatchError, match="'call' is listed twice"):
        patcher.apply(tree, [site(), site("before")])


@pytest.mark.parametrize(
    "wrong", [{"where": "above"}, {"insert": "no newline"}, {"anchor": "no newline"}, {"inside": "no newline"}]
)
def test_a_call_site_that_is_not_made_of_whole_lines_is_refused(wrong):
    with pytest.raises(patcher.PatchError, match="call site 'call'"):
        replace(site(), **wrong)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The files with call sites, straight out of the source distribution, in a git-free folder."""
    folder = tmp_path_factory.mktemp("pristine")
    wanted = {s.file for s in CALL_SITES}
    with tarfile.open(fetch_sdist(), "r:gz") as archive:
        for member in archive:
            inside = member.name.partition("/vendor/llama.cpp/")[2]
            if inside in wanted:
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                (folder / inside).write_bytes(archive.extractfile(member).read())
                wanted.remove(inside)
                if not wanted:
                    break
    assert not wanted
    return folder


def test_the_committed_patch_is_what_call_sites_make_on_the_pinned_tree(pristine):
    committed = (cpp_ext_dir() / "llama_cpp.patch").read_text()
    assert patcher.unified_diff(patcher.patched_files(pristine, CALL_SITES)) == committed
    assert patcher.unified_diff(patcher.patched_files(source_tree(), CALL_SITES)) == committed


def test_git_apply_of_the_committed_patch_gives_the_patched_tree(pristine, tmp_path):
    """Independent of our own inserting: git applies the committed diff to the pristine files."""
    for s in CALL_SITES:
        (tmp_path / s.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / s.file).write_bytes((pristine / s.file).read_bytes())
    done = subprocess.run(
        ["git", "apply", cpp_ext_dir() / "llama_cpp.patch"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tree = source_tree()
    for s in CALL_SITES:
        assert (tmp_path / s.file).read_bytes() == (tree / s.file).read_bytes(), s.file


def test_the_program_checks_updates_and_refuses(pristine, tmp_path):
    script = cpp_ext_dir() / "patch_llama_cpp.py"
    good = subprocess.run([sys.executable, script, pristine, "--check"], capture_output=True, text=True)
    assert good.returncode == 0 and "matches" in good.stdout, good.stdout + good.stderr
    bad = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ") and "no such file" in bad.stderr and bad.stderr.count("\n") == 1
