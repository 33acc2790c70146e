"""Which type every tensor gets in each mode, on tiny models with a head of their own (llama) and without (qwen2)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export.calibration.calibrate import EMBEDDING_OUTPUT, calibrate
from tacq_export.calibration.hessian import damped_hessian
from tacq_export.calibration.predict_loss import embedding_loss, kept_shares, options_for
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import type_bytes
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.planning import plan_types as module
from tacq_export.planning.plan_types import fixed_types, plan_types
from tacq_export.quantization.quantize_model import head_tensor, rounding_error
from tacq_export.quantization.trial_errors import TRIAL
from tacq_export.reporting import Reporter

TEXTS = [[1, 5, 9, 20, 33, 270, 4], [1, 300, 12, 5, 5, 91], list(range(1, 30))]
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def config(**options) -> ExportConfig:
    return ExportConfig(model="m", task="t", outfile="o", **options)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def setting(request, load_tiny, tmp_path_factory):
    """(loaded, head, calibration)"""
    loaded = load_tiny(request.param)
    head = head_tensor(loaded)
    return (
        loaded,
        head,
        calibrate(
            loaded, head, TEXTS, None, TRIAL, config(score="tacq"), tmp_path_factory.mktemp(request.param), Reporter()
        ),
    )


def plan(setting, **options):
    """({GGUF name: type in lower case} of all matrices, selection)"""
    loaded, head, calibration = setting
    asked = config(**options)
    fixed = fixed_types(loaded, asked)
    selection = plan_types(loaded, calibration, TEXTS, head, fixed, asked, rounding_error, Reporter())
    types = fixed | {name: s.type.name.lower() for name, s in selection.items()}
    ends = {t.name for t in (loaded.embedding, loaded.head) if t}
    assert set(types) == {t.name for t in loaded.linear} | ends, "a matrix has no type"
    ours = {name for name, kind in types.items() if kind.upper() in TYPES_BY_NAME}
    assert set(selection) == ours, "what becomes one of our types is selected, and nothing else"
    for name, s in selection.items():
        room = 0
        if s.type.p:
            rows, columns = next(t.shape for t in loaded.linear if t.name == name)
            room = (rows * columns // 64 * s.type.p - 16 - 4 * (rows + 1)) // 4
        assert len(s.kept) == room and s.selected <= room and s.kept.tolist() == sorted(set(s.kept.tolist())), (
            "the room is not used up"
        )
    return types, selection


def linear_bits(setting, types: dict[str, str]) -> float:
    loaded = setting[0]
    return 8 * sum(type_bytes(t.shape, types[t.name]) for t in loaded.linear) / loaded.n_linear


def test_tied_models_have_no_head_of_their_own(load_tiny):
    assert load_tiny("llama").head is not None and load_tiny("qwen2").head is None


# --- what the user decides ---


def test_embedding_and_head_have_a_default_unless_a_size_decides(setting):
    loaded = setting[0]
    ends = [EMBEDDING] if loaded.head is None else [EMBEDDING, HEAD]
    assert fixed_types(loaded, config()) == dict.fromkeys(ends, "tacq4")
    assert fixed_types(loaded, config(target_size="1M")) == {}
    assert fixed_types(loaded, config(target_size="1M", token_embedding_type="f16")) == {EMBEDDING: "f16"}
    both = fixed_types(loaded, config(token_embedding_type="q8_0", output_tensor_type="tacq3"))
    assert both == {EMBEDDING: "q8_0"} | ({} if loaded.head is None else {HEAD: "tacq3"})


def test_the_first_pattern_that_matches_counts(setting):
    loaded = setting[0]
    found = fixed_types(
        loaded,
        config(
            tensor_types=(r"blk\.0\.ffn_down=TACQ3", "ffn_down=q8_0", "ffn=tacq4_s16", "^token_embd=q4_0"),
            token_embedding_type="f16",
        ),
    )
    for i in range(2):
        assert found.pop(f"blk.{i}.ffn_down.weight") == ("tacq3" if i == 0 else "q8_0")
        assert found.pop(f"blk.{i}.ffn_up.weight") == found.pop(f"blk.{i}.ffn_gate.weight") == "tacq4_s16"
    assert found.pop(EMBEDDING) == "q4_0", "the pattern says more than the general option"
    assert found == ({} if loaded.head is None else {HEAD: "tacq4"})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ("no_such=tacq2",),
            r"--tensor-type: 'no_such' matches no matrix of .*; names are like blk\.0\.\w+\.weight\.$",
        ),
        (("attn_norm=f16",), r"'attn_norm' matches no matrix"),
        (("ffn=tacq2_s16", "zzz=f16"), r"'zzz' matches no matrix"),
        (
            ("attn_q=tacq2_s1",),
            r"--tensor-type: 'blk\.0\.attn_q\.weight' \(64 x 64\) has no room for kept weights in TACQ2_S1; give it a "
            r"base type or a larger S\.$",
        ),
        (
            ("token_embd=tacq2_s16",),
            r"--tensor-type: 'token_embd\.weight' cannot be tacq2_s16; embedding and head keep no weights, give it a "
            r"base type\.$",
        ),
    ],
)
def test_patterns_that_cannot_be_met_are_named(setting, entries, message):
    with pytest.raises(TacqError, match=message):
        fixed_types(setting[0], config(tensor_types=entries))


# --- one base type ---


@pytest.mark.parametrize("base", ["tacq2", "tacq3", "tacq4"])
@pytest.mark.parametrize("above", [0.0, 0.2, 0.9])
def test_one_width_within_a_number_of_bits(setting, base, above):
    target = TYPES_BY_NAME[base.upper()].bits_per_weight + above
    types, selection = plan(setting, base_type=base, target_bpw=target)
    assert linear_bits(setting, types) <= target
    assert all(types[t.name].startswith(base) for t in setting[0].linear)
    assert (sum(s.selected for s in selection.values()) > 0) == (above > 0.1)


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.004])  # a larger share does not fit the sections of such tiny matrices
def test_one_width_and_a_share_of_the_weights(setting, ratio):
    loaded = setting[0]
    types, selection = plan(setting, score="tacq", ratio=ratio)
    assert all(types[t.name].startswith("tacq2") for t in loaded.linear)
    assert sum(s.selected for s in selection.values()) == round(ratio * loaded.n_linear)


@pytest.mark.parametrize("ratio", [0.002, 0.005, 0.02])
def test_one_width_keeps_the_top_of_the_whole_model(setting, ratio):
    """By sorting all saliencies: of each matrix what is above the border, and what fills its room."""
    loaded, _, calibration = setting
    _, selection = plan(setting, score="tacq", ratio=ratio, base_type="tacq3")
    scores = {
        t.name: (calibration.gradient(t.name, 1) * rounding_error(t, 3).abs() * t.weight.abs()).reshape(-1)
        for t in loaded.linear
    }
    border = float(
        np.sort(np.concatenate([s.numpy() for s in scores.values()]))[::-1][round(ratio * loaded.n_linear) - 1]
    )
    for name, score in scores.items():
        above, kept = int((score >= border).sum()), selection[name].kept
        assert selection[name].selected == min(above, len(kept)) and (
            len(kept) >= above or selection[name].type.p == 16
        )
        assert set(kept.tolist()) == set(score.argsort(descending=True)[: len(kept)].tolist())


def test_types_of_the_user_count_within_the_limit_of_one_width(setting):
    for asked in ("q8_0", "tacq2", "tacq4_s16"):
        types, _ = plan(setting, base_type="tacq2", target_bpw=4.0, tensor_types=(f"attn_v={asked}",))
        assert types["blk.0.attn_v.weight"] == asked
        assert linear_bits(setting, types) <= 4.0, asked
    with pytest.raises(TacqError, match="--target-bpw 2.3 "):
        plan(setting, base_type="tacq2", target_bpw=2.3, tensor_types=("ffn_down=q8_0",))


# --- the best types for a size ---


@pytest.mark.parametrize("target", [2.25, 2.3, 2.45, 2.9, 3.4, 4.0, 5.0, 6.25])
@pytest.mark.parametrize("no_kept", [False, True])
def test_bits_per_weight_are_used_and_not_exceeded(setting, target, no_kept):
    """What is left over is less than the smallest step of the largest matrix: 64 x 128 weights by one more byte in 64,
    or one more bit a weight where nothing is kept; all but 4.25 bits of base types cannot be used then."""
    types, selection = plan(setting, target_bpw=target, no_kept=no_kept)
    used = linear_bits(setting, types)
    assert used <= target
    assert (
        used
        > (min(target, 4.25) if no_kept else target) - 8 * 8192 * (1 / 8 if no_kept else 6 / 64) / setting[0].n_linear
    )
    mixed = any(s.type.p for s in selection.values())
    assert not mixed if no_kept else mixed or target < 5  # at fewer bits width pays better than kept weights here
    if target == 3.4:
        assert len({types[t.name][:5] for t in setting[0].linear}) > 1, "one width for all is never the best here"


def test_the_default_is_2_45_bits(setting):
    assert plan(setting)[0] == plan(setting, target_bpw=2.45)[0]


@pytest.mark.parametrize("asked", ["q8_0", "tacq2", "tacq4_s16", "f16"])
def test_types_of_the_user_count_within_the_limit(setting, asked):
    types, _ = plan(setting, target_bpw=5.0, tensor_types=(f"blk.1.attn_v={asked}",))
    assert types["blk.1.attn_v.weight"] == asked and linear_bits(setting, types) <= 5.0


def test_a_mixed_type_of_the_user_keeps_the_most_salient_weights(setting):
    loaded, _, calibration = setting
    _, selection = plan(setting, score="tacq", tensor_types=("blk.0.ffn_up=tacq3_s8",), target_bpw=3.0)
    tensor = next(t for t in loaded.linear if t.name == "blk.0.ffn_up.weight")
    score = calibration.gradient(tensor.name, 1) * rounding_error(tensor, 3).abs() * tensor.weight.abs()
    kept = selection[tensor.name].kept
    assert len(kept) == (128 * 64 // 64 * 8 - 16 - 4 * 129) // 4
    assert set(kept.tolist()) == set(score.reshape(-1).argsort(descending=True)[: len(kept)].tolist())


def test_if_everything_is_decided_nothing_is_allocated(setting):
    types, selection = plan(setting, tensor_types=("blk=q4_0",), target_bpw=4.5)
    assert {types[t.name] for t in setting[0].linear} == {"q4_0"} and all(n in (EMBEDDING, HEAD) for n in selection)


def caught_options(setting, monkeypatch, **options) -> tuple[dict, int]:
    """What `allocate` was asked."""
    seen = []
    original = module.allocate
    monkeypatch.setattr(
        module, "allocate", lambda choices, budget: (seen.append((choices, budget)), original(choices, budget))[1]
    )
    plan(setting, **options)
    return seen[0]


def test_the_allocator_gets_the_predicted_losses(setting, monkeypatch):
    loaded, _, calibration = setting
    choices, budget = caught_options(setting, monkeypatch, target_bpw=3.0, tensor_types=("blk.0.attn_k=f16",))
    free = [t for t in loaded.linear if t.name != "blk.0.attn_k.weight"]
    assert list(choices) == [t.name for t in free]
    taken = type_bytes((32, 64), "f16")
    assert budget == int(3.0 * loaded.n_linear / 8) - taken
    for tensor in free:
        damped = damped_hessian(calibration.hessian(calibration.group_of(tensor.name)), 0.01)
        shares = kept_shares(
            TRIAL, tensor, damped, calibration.row_energy(tensor.name), "obs", calibration.curvature(tensor.name), 0
        )
        expected = options_for(tensor, calibration.losses()[tensor.name], shares)
        assert choices[tensor.name] == expected


def test_for_a_file_size_embedding_and_head_are_allocated_too(setting, monkeypatch):
    """A tied embedding costs what it puts out and what its logits cost."""
    loaded, head, calibration = setting
    choices, _ = caught_options(setting, monkeypatch, target_size=150_000)
    losses = calibration.losses()
    assert list(choices)[: len(loaded.linear)] == [t.name for t in loaded.linear]
    out = {
        b: embedding_loss(TRIAL, loaded.embedding, calibration.row_energy(EMBEDDING_OUTPUT), TEXTS, b)
        for b in (2, 3, 4)
    }
    both = {b: out[b] + (losses[head.name][b] if loaded.head is None else 0.0) for b in out}
    assert [(o.type.name, o.loss) for o in choices[EMBEDDING]] == [(f"TACQ{b}", both[b]) for b in both]
    assert (HEAD in choices) == (loaded.head is not None)
    if loaded.head is not None:
        assert [(o.type.name, o.loss) for o in choices[HEAD]] == [(f"TACQ{b}", losses[HEAD][b]) for b in (2, 3, 4)]
    choices, _ = caught_options(setting, monkeypatch, target_size=150_000, token_embedding_type="tacq4")
    assert EMBEDDING not in choices


def test_a_target_that_cannot_be_met_says_what_the_least_is(setting):
    with pytest.raises(
        TacqError, match=r"^--target-size 20k cannot be met: with the smallest types it is \d+ bytes; raise it\.$"
    ) as error:
        plan(setting, target_size="20k")
    least = int(str(error.value).split(" bytes")[0].split()[-1])
    plan(setting, target_size=least)
    with pytest.raises(TacqError, match="cannot be met"):
        plan(setting, target_size=least - 1)
    with pytest.raises(
        TacqError,
        match=r"^--target-bpw 2\.3 cannot be met: with the smallest types it is \d\.\d+ bits per weight; raise it\.$",
    ):
        plan(setting, target_bpw=2.3, tensor_types=("ffn_down=q8_0",))


def test_scores_that_need_no_gradient_allocate_as_well(setting):
    for score in ("random", "magnitude", "tacq-no-error", "gradient"):
        types, selection = plan(setting, score=score, target_bpw=6.0)
        assert linear_bits(setting, types) <= 6.0 and any(len(s.kept) for s in selection.values())


def test_the_same_plan_every_time(setting):
    (first, a), (second, b) = plan(setting, target_bpw=2.7), plan(setting, target_bpw=2.7)
    assert first == second and all(torch.equal(a[n].kept, b[n].kept) for n in a)
