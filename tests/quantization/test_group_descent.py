"""The C of the group descent against the same thing done naively in float64 (naive_descent.py), and how it is
compiled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import naive_descent
import naive_trellis
import numpy as np
import pytest
import torch
from naive_descent import best_group, loss_change, values_of_byte

from tacq_export.errors import TacqError
from tacq_export.quantization import group_descent
from tacq_export.quantization.fit_groups import dequantize_groups, round_to_nearest
from tacq_export.quantization.group_descent import SEARCH_WINDOW, PanelDescent

BITS = [2, 3, 4]


def panel(bits: int, rows: int, fresh: bool, share_kept: float = 0.0) -> dict:
    """One panel in the middle of a descent: correlated inputs, gradients as large as those of real errors."""
    g = torch.Generator().manual_seed(100 * bits + rows)
    x = (
        torch.randn(200, 32, generator=g)
        @ (torch.eye(32) + torch.randn(32, 32, generator=g) / 8)
        * (torch.arange(32) % 5 + 1)
    )
    h = x.t() @ x / 200
    target = torch.randn(rows, 32, generator=g) * 0.05
    codes, scale_bytes = torch.zeros(rows, 32, dtype=torch.uint8), torch.zeros(rows, dtype=torch.uint8)
    base = torch.zeros(rows, 32)
    values = target.clone()
    if not fresh:
        # Codes of another byte than the best one: there is something to find.
        for r, row in enumerate(target):
            if bits == 4:
                scale_bytes[r] = naive_descent.candidate_bytes(float(row.abs().max()))[1]
                distance = np.abs(row.numpy()[:, None] - values_of_byte(int(scale_bytes[r])))
                codes[r] = torch.from_numpy(distance.argmin(1).astype(np.uint8))
            else:
                scale_bytes[r] = naive_trellis.candidate_bytes(bits, row.numpy(), None)[1]
                codes[r] = torch.randint(0, 1 << bits, (32,), generator=g).byte()
        base = dequantize_groups(bits, codes, scale_bytes[:, None])
        values = base.clone()
    kept = torch.rand(rows, 32, generator=g) < share_kept if share_kept else None
    if kept is not None:
        values = torch.where(kept, target, values)
    gradient = (values - target) @ h + 0.002 * torch.randn(rows, 32, generator=g)
    return {
        "h": h,
        "gradient": gradient,
        "values": values,
        "base": base,
        "codes": codes,
        "scale_bytes": scale_bytes,
        "kept": kept,
        "fresh": fresh,
    }


def run(bits: int, task: dict, **options) -> dict:
    """What the C makes of copies: {values, base, codes, scale_bytes, change}."""
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in task.items()}
    change = PanelDescent(bits, len(task["values"]), **options)(**own)
    assert torch.equal(own["gradient"], task["gradient"]) and torch.equal(own["h"], task["h"]), "inputs were changed"
    return {k: own[k] for k in ("values", "base", "codes", "scale_bytes")} | {"change": change}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("share_kept", [0.0, 0.1])
def test_byte_and_codes_are_those_of_trying_everything_in_float64(bits, fresh, share_kept):
    """float32 loses 1e-6 of a loss, so two bytes or two codes whose losses are nearer than that may change places, and
    then the codes after them differ, too: in no group of these seeds; one of 40 is allowed, of about the same loss."""
    rows = 40
    task = panel(bits, rows, fresh, share_kept)
    found = run(bits, task)
    kept = np.zeros((rows, 32), bool) if task["kept"] is None else task["kept"].numpy()
    h = task["h"].double().numpy()
    equal = 0
    for r in range(rows):
        gradient, values = task["gradient"][r].double().numpy(), task["values"][r].double().numpy()
        present = None if fresh else int(task["scale_bytes"][r])
        byte, codes, base, after = best_group(bits, h, gradient, values, kept[r], present, task["codes"][r].numpy())
        expected, ours = (loss_change(h, gradient, v - values) for v in (after, found["values"][r].double().numpy()))
        assert ours == pytest.approx(expected, rel=0.02, abs=1e-7)
        same = byte == int(found["scale_bytes"][r]) and np.array_equal(codes, found["codes"][r].numpy())
        equal += same
        if same:
            assert np.array_equal(found["base"][r].numpy(), base.astype(np.float32))
            np.testing.assert_allclose(found["values"][r].numpy(), after, rtol=1e-4, atol=1e-6)
    assert equal >= rows - 1
    assert torch.equal(found["change"], found["values"] - task["values"])
    assert torch.equal(found["values"][~torch.from_numpy(kept)], found["base"][~torch.from_numpy(kept)])
    assert not torch.equal(found["codes"], task["codes"]) and not torch.equal(found["scale_bytes"], task["scale_bytes"])


@pytest.mark.parametrize("bits", BITS)
def test_a_second_pass_goes_on_from_the_first(bits):
    """Loss falls, and a third changes less than the second: coordinate descent. A trellis has its best path before the
    first pass, which has little to add."""
    task = panel(bits, 30, fresh=True)
    h = task["h"].double().numpy()
    gradient, values = task["gradient"].double().numpy(), task["values"].double().numpy()
    losses = []
    for passes in (1, 2, 6) if bits == 4 else (0, 1, 6):
        after = run(bits, task, passes=passes)["values"].double().numpy()
        losses.append(np.array([loss_change(h, g, a - v) for g, a, v in zip(gradient, after, values, strict=False)]))
    assert (losses[1] <= losses[0] + 1e-7).all() and (losses[2] <= losses[1] + 1e-7).all()
    assert (
        losses[1].sum() < losses[0].sum() - 1e-4
        and losses[1].sum() - losses[2].sum() < losses[0].sum() - losses[1].sum()
    )


@pytest.mark.parametrize("bits", BITS)
def test_kept_weights_end_where_their_own_loss_is_least(bits):
    """After many passes the gradient at every kept weight is 0."""
    task = panel(bits, 20, fresh=True, share_kept=0.2)
    found = run(bits, task, passes=100)
    gradient = task["gradient"].double() + found["change"].double() @ task["h"].double()
    kept = task["kept"]
    assert gradient[kept].abs().max() < 1e-4 * gradient[~kept].abs().max()
    assert (found["values"][kept] != found["base"][kept]).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_diagonal_matrix_gives_weighted_plain_rounding(bits):
    """No weight has anything to do with another: fit_groups, which looks at the errors only, must choose the same."""
    weights = torch.randn(50, 32, generator=torch.Generator().manual_seed(bits)) * 0.05
    diagonal = torch.linspace(1, 9, 32)
    zeros = torch.zeros(50, 32)
    task = {
        "h": torch.diag(diagonal),
        "gradient": zeros,
        "values": weights,
        "base": zeros.clone(),
        "codes": zeros.byte(),
        "scale_bytes": torch.zeros(50, dtype=torch.uint8),
        "kept": None,
        "fresh": True,
    }
    found = run(bits, task)
    codes, scale_bytes = round_to_nearest(bits, weights, diagonal)
    assert torch.equal(found["codes"], codes) and torch.equal(found["scale_bytes"], scale_bytes[:, 0])


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_get_the_zero_scale(bits):
    task = panel(bits, 4, fresh=True, share_kept=0.2)
    task["gradient"].zero_()
    task["values"][1] = 0
    task["values"][2][~task["kept"][2]] = 0  # all that is not kept
    task["kept"][3] = True
    found = run(bits, task)
    assert found["scale_bytes"].tolist()[1:] == [0, 0, 0] and int(found["scale_bytes"][0]) != 0
    assert (found["codes"][1:] == 0).all() and (found["base"][1:] == 0).all()
    assert (found["values"][1] == 0).all()
    assert torch.equal(found["values"][2:], task["values"][2:]), "kept weights stay where they were wanted"
    again = run(bits, task | {k: found[k] for k in ("values", "base", "codes", "scale_bytes")} | {"fresh": False})
    assert (again["scale_bytes"][1:] == 0).all() and (again["change"][1:] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_weights_beyond_the_range_of_the_scales_get_the_largest_or_the_smallest(bits):
    task = panel(bits, 2, fresh=True)
    task["gradient"].zero_()
    task["values"][0] *= 1e6
    task["values"][1] *= 1e-12
    found = run(bits, task)
    ks = [int(b) & 127 for b in found["scale_bytes"]]
    assert 127 - SEARCH_WINDOW[bits][0] <= ks[0] <= 127 and 1 <= ks[1] <= 1 + SEARCH_WINDOW[bits][1]
    assert torch.isfinite(found["values"]).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_group_that_cannot_be_better_stays_as_it_is(bits):
    """Run until nothing moves; then not a byte changes, and the change is exactly 0."""
    task = panel(bits, 25, fresh=True)
    h, target = task["h"], task["values"].clone()
    task["gradient"].zero_()
    state = run(bits, task)
    for _ in range(30):
        state = run(
            bits,
            task
            | {k: state[k] for k in ("values", "base", "codes", "scale_bytes")}
            | {"gradient": (state["values"] - target) @ h, "fresh": False},
        )
    assert (state["change"] == 0).all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 64])
def test_the_number_of_threads_changes_nothing(rows):
    task = panel(2, rows, fresh=False, share_kept=0.05)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(2, task))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)
    alone = run(2, {k: v[-1:].contiguous() if isinstance(v, torch.Tensor) and k != "h" else v for k, v in task.items()})
    assert all(torch.equal(results[0][k][-1:], alone[k]) for k in alone), "a row depends on the others"


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("h", torch.zeros(31, 32)),
        ("gradient", torch.zeros(8, 32).double()),
        ("gradient", torch.zeros(7, 32)),
        ("values", torch.zeros(32, 8).t()),
        ("base", torch.zeros(8, 64)),
        ("codes", torch.zeros(8, 32, dtype=torch.int64)),
        ("scale_bytes", torch.zeros(8, 1, dtype=torch.uint8)),
        ("kept", torch.zeros(8, 32, dtype=torch.uint8)),
        ("kept", torch.zeros(8, 31, dtype=torch.bool)),
        ("values", torch.zeros(8, 32, device="meta")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}-{tuple(value.shape)}-{value.device}",
)
def test_tensors_of_another_shape_or_type_are_refused_before_the_c_sees_them(name, bad):
    task = panel(2, 8, fresh=True, share_kept=0.1)
    with pytest.raises(
        ValueError, match=f"^{'bytes' if name == 'scale_bytes' else name} is torch.* expected contiguous torch"
    ):
        PanelDescent(2, 8)(**(task | {name: bad}))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no library loaded yet; afterwards the real one again."""
    monkeypatch.setenv("TACQ_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    group_descent._library.cache_clear()
    yield tmp_path / "cache" / "quantizer"
    group_descent._library.cache_clear()


def compilations(monkeypatch) -> list[list[str]]:
    """The compiler's commands from now on, but for those that ask it for its flags."""
    calls, original = [], subprocess.run

    def watched(command, **options):
        if "-" not in command:
            calls.append(command)
        return original(command, **options)

    monkeypatch.setattr(group_descent.subprocess, "run", watched)
    return calls


def test_the_library_is_compiled_once_and_used_again(cache, monkeypatch):
    calls = compilations(monkeypatch)
    first = run(2, panel(2, 5, fresh=True))
    PanelDescent(3, 5)
    assert len(calls) == 1
    (built,) = cache.iterdir()
    assert built.name.startswith("group_descent-") and built.suffix == ".so"
    group_descent._library.cache_clear()  # as in another process
    assert torch.equal(run(2, panel(2, 5, fresh=True))["codes"], first["codes"]) and len(calls) == 1


def test_another_source_or_another_machine_is_compiled_anew(cache, monkeypatch, tmp_path):
    PanelDescent(2, 1)
    monkeypatch.setattr(group_descent, "machine_identity", lambda: "another")
    group_descent._library.cache_clear()
    PanelDescent(2, 1)
    changed = tmp_path / "group_descent.c"
    changed.write_text(group_descent._SOURCES[0].read_text() + "\n// changed\n")
    monkeypatch.setattr(group_descent, "_SOURCES", [changed, *group_descent._SOURCES[1:]])
    monkeypatch.setattr(group_descent, "_FLAGS", [*group_descent._FLAGS, f"-I{group_descent._HEADERS[0].parent}"])
    group_descent._library.cache_clear()
    PanelDescent(2, 1)
    assert len(list(cache.iterdir())) == 3


def test_without_a_compiler_one_sentence_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(group_descent.shutil, "which", lambda name: None)
    with pytest.raises(TacqError) as error:
        PanelDescent(2, 1)
    assert (
        str(error.value)
        == "There is no C compiler for the quantizer; install one (on Debian and Ubuntu: sudo apt-get install gcc)."
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'x.c:3: error: no such thing' >&2; exit 1", "x.c:3: error: no such thing"),
        ("exit 1", "no output"),
        ("echo cannot >&2; exit 2", "cannot"),
    ],
)
def test_a_compiler_that_fails_is_named_with_its_reason(cache, monkeypatch, tmp_path, script, reason):
    (tmp_path / "mycc").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "mycc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "mycc"))
    with pytest.raises(TacqError) as error:
        PanelDescent(2, 1)
    assert (
        str(error.value)
        == f"{tmp_path}/mycc could not compile group_descent.c ({reason}); set CC to another C compiler."
    )
    assert not list(cache.glob("*.so"))


def test_a_compiler_that_is_not_there_is_one_sentence(cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        TacqError, match=r"^no-such-compiler could not compile group_descent.c \(.*\); set CC to another C compiler.$"
    ):
        PanelDescent(2, 1)


def test_the_compiler_may_have_arguments(cache, monkeypatch):
    monkeypatch.setenv("CC", "cc -DUNUSED=1")
    calls = compilations(monkeypatch)
    PanelDescent(2, 1)
    assert calls[0][:2] == ["cc", "-DUNUSED=1"]


def test_only_flags_that_the_compiler_takes_are_given(tmp_path):
    """One compiler has an unknown flag, one warns of it, one is not there."""
    flags = ["-march=native", "-fno-such-flag", "-O1"]
    assert group_descent.accepted_flags("cc", flags) == ["-march=native", "-O1"]
    warns = tmp_path / "warns"
    warns.write_text('#!/bin/sh\ncase "$*" in *-march=native*-Werror*) exit 1;; esac\n')
    warns.chmod(0o755)
    assert group_descent.accepted_flags(str(warns), flags) == ["-fno-such-flag", "-O1"]
    assert group_descent.accepted_flags("no-such-compiler", flags) == []


def test_a_compiler_that_does_not_take_the_flags_of_this_machine_compiles_without_them(cache, monkeypatch, tmp_path):
    """As gcc does on aarch64: an unknown option is an error. The result is the same, to the bit."""
    script = tmp_path / "cc"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-mprefer-vector-width*|*-march=*) echo "error: unknown" >&2; exit 1;; esac\n'
        'exec cc "$@"\n'
    )
    script.chmod(0o755)
    task = panel(2, 40, fresh=False, share_kept=0.1)
    native = run(2, task)
    monkeypatch.setenv("CC", str(script))
    group_descent._library.cache_clear()
    calls = compilations(monkeypatch)
    plain = run(2, task)
    assert calls and not any("-march" in argument or "-mprefer" in argument for argument in calls[0])
    assert all(torch.equal(native[k], plain[k]) for k in native)


CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"


@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"needs {CROSS} and {EMULATOR}")
def test_an_arm_processor_makes_the_same_bytes(tmp_path):
    """Compiled for aarch64 with the very flags that the quantizer would choose there, and run in an emulator: all
    values, codes and bytes are those of this machine, to the bit."""
    program = tmp_path / "run_descent"
    flags = [flag for flag in group_descent._FLAGS if flag not in ("-shared", "-fPIC")]
    flags += group_descent.accepted_flags(CROSS, group_descent._SPEED_FLAGS)
    source = Path(__file__).with_name("run_descent.c")
    command = [CROSS, *flags, "-static", "-Wall", "-Wextra", "-Werror", f"-I{group_descent._HEADERS[0].parent}"]
    sources = [str(path) for path in [source, *group_descent._SOURCES]]
    subprocess.run([*command, *sources, "-lm", "-o", str(program)], check=True)
    assert b"aarch64" in subprocess.run(["readelf", "-h", program], capture_output=True).stdout.lower()
    for bits in BITS:
        for fresh, share_kept in ((True, 0.0), (False, 0.1)):
            rows = 50
            task = panel(bits, rows, fresh, share_kept)
            descent = PanelDescent(bits, rows)
            numbers = [getattr(descent._task, key) for key in ("passes", "below", "above", "closed")]
            sizes = [bits, len(descent._levels), *numbers]
            kept = task["kept"] if task["kept"] is not None else torch.zeros(rows, 32, dtype=torch.bool)
            given = [torch.tensor([*sizes, int(fresh), int(task["kept"] is not None), rows], dtype=torch.int32)]
            given += [descent._scales.float(), descent._levels.float(), task["h"], kept]
            given += [task[key] for key in ("gradient", "values", "base", "codes", "scale_bytes")]
            (tmp_path / "in").write_bytes(b"".join(t.contiguous().numpy().tobytes() for t in given))
            subprocess.run([EMULATOR, program, tmp_path / "in", tmp_path / "out"], check=True, timeout=120)
            here = run(bits, task)
            ours = [here[key] for key in ("values", "base", "change", "codes", "scale_bytes")]
            assert (tmp_path / "out").read_bytes() == b"".join(t.numpy().tobytes() for t in ours), (bits, fresh)


def test_the_source_is_installed_with_the_package():
    """setuptools leaves out what pyproject.toml does not name."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    settings = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"].get("tacq_export.quantization", [])
    for path in [*group_descent._SOURCES, *group_descent._HEADERS]:
        assert any(path.match(pattern) for pattern in patterns), path
